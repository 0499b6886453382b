#include "engine.hpp"

#include <algorithm>
#include <cmath>
#include <set>

#include "error.hpp"
#include "schedule.hpp"

namespace af {
namespace {

constexpr int64_t longest = int64_t{1} << 40;

// Numbers of a shape, refused where it is not one.
template <size_t N>
size_t checked_count(const char* name, const std::array<int64_t, N>& shape) {
  int64_t count = 1;
  for (const int64_t axis : shape) {
    if (axis < 0 || axis > longest || (axis && count > longest / axis)) {
      throw Error(ANYFLOW_SHAPE,
                  std::string(name) + " has shape " + tuple(shape) + "; no axis may be negative, nor the whole too large.");
    }
    count *= axis;
  }
  return static_cast<size_t>(count);
}

void check_values(const char* name, const float* data, size_t count) {
  if (count == 0) return;  // whoever looks at the shape will say so
  if (!data)
    throw Error(ANYFLOW_INVALID, std::string(name) + " is NULL; give the address of " + std::to_string(count) + " numbers.");
  if (!std::all_of(data, data + count, [](float value) { return std::isfinite(value); })) {
    throw Error(ANYFLOW_INVALID, std::string(name) + " holds NaN or infinity; nothing useful can come of it.");
  }
}

void check_channels(const char* name, int64_t given, int64_t allowed) {
  if (given != allowed) {
    throw Error(ANYFLOW_SHAPE, std::string(name) + " has " + std::to_string(given) + " channels on axis 2; this model takes " +
                                   std::to_string(allowed) + ".");
  }
}

std::vector<float> per_frame(const char* name, std::span<const float> times, const LatentShape& shape) {
  const auto frames = static_cast<size_t>(shape[0] * shape[1]);
  if (times.size() == 1) return std::vector<float>(frames, times[0]);
  if (times.size() != frames) {
    throw Error(ANYFLOW_SHAPE, std::string(name) + " has " + std::to_string(times.size()) +
                                   " numbers; allowed is one, or one for each of (batch, frames) = " +
                                   tuple(std::span<const int64_t>(shape).first(2)) + ".");
  }
  return {times.begin(), times.end()};
}

std::string shown_times(const std::vector<float>& times) {
  std::vector<double> distinct(times.begin(), times.end());
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  if (distinct.size() == 1) return shown(distinct[0]);
  if (distinct.size() > 6) distinct.resize(6);
  for (double& time : distinct) time = std::nearbyint(time * 1000) / 1000;
  return list(std::span<const double>(distinct));
}

std::pair<std::vector<float>, std::vector<float>> frame_times(std::span<const float> t, std::span<const float> r,
                                                              const LatentShape& shape) {
  auto source = per_frame("t", t, shape), target = per_frame("r", r, shape);
  for (size_t i = 0; i < source.size(); ++i) {
    if (!(source[i] <= static_cast<float>(train_timesteps) && source[i] >= target[i] && target[i] >= 0)) {
      throw Error(ANYFLOW_INVALID, "t is " + shown_times(source) + " and r is " + shown_times(target) +
                                       "; allowed is 1000 >= t >= r >= 0 in every frame.");
    }
  }
  return {std::move(source), std::move(target)};
}

}  // namespace

size_t elements(const LatentShape& shape) {
  size_t count = 1;
  for (const int64_t axis : shape) count *= static_cast<size_t>(axis);
  return count;
}

void check_latents(const char* name, const Latents& latents) {
  check_values(name, latents.data, checked_count(name, latents.shape));
}

void Run::step(std::span<const float> t, std::span<const float> r) {
  const auto [source, target] = frame_times(t, r, shape_);
  do_step(source, target);
}

void Run::velocity(std::span<const float> t, std::span<const float> r, float* into) {
  const auto [source, target] = frame_times(t, r, shape_);
  do_velocity(source, target, into);
}

std::unique_ptr<Run> Engine::start(const Latents& latents, const Text& text) {
  const Architecture& a = bundle_->manifest.architecture;
  if (bundle_->manifest.causal()) {
    throw Error(ANYFLOW_INVALID, bundle_->path.string() + " is a causal model, which is made chunk by chunk: open a stream.");
  }
  check_latents("latents", latents);
  check_values("text", text.data, checked_count("text", text.shape));
  ranges().check(latents.shape, text.shape);
  check_channels("latents", latents.shape[2], a.in_channels);
  check_channels("text", text.shape[2], a.text_channels);
  return do_start(latents, text);
}

void Engine::check_text(const Text& text) const {
  const int64_t channels = bundle_->manifest.architecture.text_channels;
  check_values("text", text.data, checked_count("text", text.shape));
  const Range& allowed = *ranges().find("text");
  if (text.shape[0] != 1 || !allowed.holds(text.shape[1]) || text.shape[2] != channels) {
    throw Error(ANYFLOW_SHAPE, "text has shape " + tuple(text.shape) + "; a stream takes (1, " + allowed.shown() + ", " +
                                   std::to_string(channels) + "): one video at a time.");
  }
}

std::unique_ptr<Cache> Engine::open_cache(const Text& text, const CachePlan& plan) { return do_open_cache(text, plan); }

std::shared_ptr<Engine> open_engine(std::shared_ptr<const Bundle> bundle, const std::string& backend, EngineOptions options) {
  std::string names;
  for (const Backend& known : backends()) names += (names.empty() ? "" : ", ") + std::string(known.name);
  if (options.device < 0)
    throw Error(ANYFLOW_INVALID, "device is " + std::to_string(options.device) + "; allowed are whole numbers from 0.");
  if (options.threads < 0)
    throw Error(ANYFLOW_INVALID, "threads is " + std::to_string(options.threads) +
                                     "; allowed are whole numbers from 1, or 0 for the backend's own choice.");
  if (!options.provider.empty() && options.provider != "cpu" && options.provider != "cuda") {
    throw Error(ANYFLOW_INVALID, "unknown provider " + in_quotes(options.provider) + ": allowed are cpu, cuda.");
  }
  const auto built = built_engines(*bundle);
  for (const Backend& known : backends()) {
    const bool has = std::any_of(built.begin(), built.end(), [&](const auto& engine) { return engine.second == known.name; });
    if (backend.empty() ? !has : backend != known.name) continue;
    if (options.provider.empty()) options.provider = known.provider;
    auto engine = known.open(bundle, options);
    log(ANYFLOW_LOG_INFO, engine->description() + ", opened from " + bundle->path.string());
    return engine;
  }
  if (!backend.empty()) {
    throw Error(ANYFLOW_BACKEND, "this library was built without a backend " + in_quotes(backend) + ": it has " +
                                     (names.empty() ? "none" : names) + ". CMake says what each needs when it configures.");
  }
  std::set<std::string> theirs;
  for (const auto& engine : built) theirs.insert(engine.second);
  std::string others;
  for (const std::string& name : theirs) others += (others.empty() ? "" : ", ") + name;
  throw Error(ANYFLOW_BACKEND,
              bundle->path.string() + " has no engine for a backend of this library (" + (names.empty() ? "it has none" : names) +
                  ")" + (others.empty() ? "" : ": it has engines of " + others) + ". Make one on this machine: anyflow-build " +
                  bundle->path.string() + " --backend " + (names.empty() ? "aotinductor" : backends()[0].name));
}

}  // namespace af
