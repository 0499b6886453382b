#include "schedule.hpp"

#include <cmath>

#include "error.hpp"

namespace af {
namespace {

[[noreturn]] void refuse(const std::string& text) { throw Error(ANYFLOW_INVALID, text); }

double moved(double s, double shift) { return shift * s / (shift * s + (1.0 - s)); }

std::vector<double> shifted(std::span<const double> sigmas, double shift) {
  check_shift(shift);
  std::vector<double> times;
  for (size_t i = 0; i < sigmas.size(); ++i) {
    if (!(sigmas[i] >= 0.0 && sigmas[i] <= 1.0)) {
      refuse("sigma " + std::to_string(i) + " is " + shown(sigmas[i]) + "; allowed are 0 (clean) to 1 (noise).");
    }
    times.push_back(train_timesteps * moved(sigmas[i], shift));
  }
  return times;
}

std::vector<double> closed(std::vector<double> times) {
  if (!times.empty() && times.back() != 0.0) times.push_back(0.0);
  return times;
}

}  // namespace

void check_shift(double shift) {
  if (!std::isfinite(shift) || shift <= 0) {
    refuse("shift is " + shown(shift) + "; allowed is any positive number (the released models use 5).");
  }
}

Schedule::Schedule(std::vector<double> timesteps) : timesteps_(std::move(timesteps)) {
  const auto& times = timesteps_;
  if (times.size() < 2)
    refuse("a schedule needs at least one transition (two timesteps); given " + list(std::span<const double>(times)) + ".");
  if (steps() > max_steps) {
    refuse("a schedule of " + std::to_string(steps()) + " steps was given; allowed are 1 to " + std::to_string(max_steps) + ".");
  }
  for (size_t i = 0; i < times.size(); ++i) {
    if (!std::isfinite(times[i]) || times[i] < 0.0 || times[i] > train_timesteps) {
      refuse("timestep " + std::to_string(i) + " is " + shown(times[i]) + "; allowed are 0 (clean) to 1000 (noise).");
    }
  }
  for (size_t i = 0; i + 1 < times.size(); ++i) {
    if (times[i + 1] >= times[i]) {
      refuse("timesteps must fall from noise to clean: number " + std::to_string(i + 1) + " is " + shown(times[i + 1]) +
             ", after " + shown(times[i]) + ". Sort them downwards.");
    }
  }
  if (times.back() != 0.0) refuse("a schedule ends at 0 (clean); this one ends at " + shown(times.back()) + ".");
}

Schedule Schedule::uniform(int64_t steps, double shift) {
  if (steps < 1 || steps > max_steps) {
    refuse("steps is " + std::to_string(steps) + "; allowed are whole numbers from 1 to " + std::to_string(max_steps) + ".");
  }
  std::vector<double> sigmas;
  for (int64_t i = 0; i < steps; ++i) sigmas.push_back(1.0 - static_cast<double>(i) / static_cast<double>(steps));
  sigmas.push_back(0.0);
  return Schedule(shifted(sigmas, shift));
}

Schedule Schedule::from_sigmas(std::span<const double> sigmas, double shift) { return Schedule(closed(shifted(sigmas, shift))); }

Schedule Schedule::from_timesteps(std::span<const double> timesteps) {
  return Schedule(closed({timesteps.begin(), timesteps.end()}));
}

double time_after(double t, int64_t steps, double shift) {
  if (steps == 1) return 0.0;
  const double s = t / train_timesteps;
  const double even = s / (s + shift * (1.0 - s)) * (1.0 - 1.0 / static_cast<double>(steps));
  return train_timesteps * moved(even, shift);
}

}  // namespace af
