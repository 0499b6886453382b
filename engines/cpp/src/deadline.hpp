// As many steps as the time allows; the same decisions as engines/deadline.py.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "schedule.hpp"

namespace af {

using Shape = std::vector<int64_t>;

// Seconds a transition takes, for each shape of latents. Safe to share between threads.
class Pace {
 public:
  void record(const Shape& shape, double seconds);
  std::optional<double> seconds(const Shape& shape) const;

 private:
  mutable std::mutex mutex_;
  std::map<Shape, std::deque<double>> recent_;
};

struct Deadline {
  double seconds;
  double shift = 5.0;
  int64_t most = 50;
  std::shared_ptr<Pace> pace;
  std::function<bool()> enough;
  std::function<double()> clock;

  void check() const;
};

struct Outcome {
  int64_t steps;
  bool draft;
  double seconds, deadline;
};

// One sample under a deadline: the clock runs from here.
class Route {
 public:
  Route(const Deadline& deadline, Shape shape);

  bool known() const { return deadline_.pace->seconds(shape_).has_value(); }
  void timed(const std::function<void()>& transition);
  // The time to go to from `t`: 0 when no two transitions fit any more.
  double next();
  void went(double r);
  Outcome ended(int64_t steps, bool draft) const;

  double t = train_timesteps;
  int64_t made = 0, planned = 0;

 private:
  const Deadline& deadline_;
  Shape shape_;
  double started_, end_;
};

}  // namespace af
