// The times a sample passes through; the same numbers, to the last bit, as anyflow_deploy/schedule.py.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace af {

inline constexpr double train_timesteps = 1000.0;
inline constexpr int64_t max_steps = 1000;

class Schedule {
 public:
  explicit Schedule(std::vector<double> timesteps);
  static Schedule uniform(int64_t steps, double shift);
  static Schedule from_sigmas(std::span<const double> sigmas, double shift);
  static Schedule from_timesteps(std::span<const double> timesteps);

  const std::vector<double>& timesteps() const { return timesteps_; }
  int64_t steps() const { return static_cast<int64_t>(timesteps_.size()) - 1; }

 private:
  std::vector<double> timesteps_;
};

// Where the first of `steps` transitions from t to 0 leads on the shifted grid.
double time_after(double t, int64_t steps, double shift);

// shift is a positive number.
void check_shift(double shift);

}  // namespace af
