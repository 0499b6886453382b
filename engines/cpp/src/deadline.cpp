#include "deadline.hpp"

#include <algorithm>

#include "error.hpp"

namespace af {
namespace {

constexpr size_t remembered = 5;

}  // namespace

void Pace::record(const Shape& shape, double seconds) {
  const std::lock_guard lock(mutex_);
  auto& recent = recent_[shape];
  recent.push_back(seconds);
  if (recent.size() > remembered) recent.pop_front();
}

// The slowest of the last five, since late is worse than idle.
std::optional<double> Pace::seconds(const Shape& shape) const {
  const std::lock_guard lock(mutex_);
  const auto found = recent_.find(shape);
  if (found == recent_.end()) return std::nullopt;
  return *std::max_element(found->second.begin(), found->second.end());
}

void Deadline::check() const {
  if (!(seconds > 0))
    throw Error(ANYFLOW_INVALID, "a deadline of " + shown(seconds) + " s was given; allowed is any positive number.");
  if (most < 1 || most > max_steps) {
    throw Error(ANYFLOW_INVALID,
                "at most " + std::to_string(most) + " steps were asked for; allowed are 1 to " + std::to_string(max_steps) + ".");
  }
  check_shift(shift);
}

Route::Route(const Deadline& deadline, Shape shape) : deadline_(deadline), shape_(std::move(shape)) {
  started_ = deadline_.clock();
  end_ = started_ + deadline_.seconds;
}

void Route::timed(const std::function<void()>& transition) {
  const double started = deadline_.clock();
  transition();
  deadline_.pace->record(shape_, deadline_.clock() - started);
}

double Route::next() {
  const double pace = deadline_.pace->seconds(shape_).value_or(0.0);
  const double left = end_ - deadline_.clock();
  const int64_t most = deadline_.most;
  const int64_t fitting = pace == 0.0 ? most : static_cast<int64_t>(std::clamp(left / pace, 0.0, static_cast<double>(most)));
  const int64_t count = deadline_.enough() ? 1 : std::max<int64_t>(1, std::min(fitting, most - made));
  planned = made + count;
  return time_after(t, count, deadline_.shift);
}

void Route::went(double r) { t = r, ++made; }

Outcome Route::ended(int64_t steps, bool draft) const { return {steps, draft, deadline_.clock() - started_, deadline_.seconds}; }

}  // namespace af
