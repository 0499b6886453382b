// anyflow.hpp: anyflow.h with destructors, exceptions and std::function. C++17, nothing but this header and the library.
//
//   anyflow::Engine engine(anyflow::Bundle("my-bundle"));
//   anyflow::Latents clean = engine.sample(anyflow::noise({1, 21, 16, 60, 104}, 0), text, anyflow::Schedule::uniform(4));
//
// What fails throws anyflow::Error. A callback may throw: the call is aborted, and the exception comes out of it.
#pragma once

#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "anyflow.h"

namespace anyflow {

class Error : public std::runtime_error {
 public:
  Error(anyflow_code code, const std::string& text) : std::runtime_error(text), code_(code) {}
  anyflow_code code() const noexcept { return code_; }

 private:
  anyflow_code code_;
};

inline void check(anyflow_error* error) {
  if (!error) return;
  const std::unique_ptr<anyflow_error, void (*)(anyflow_error*)> owner(error, anyflow_error_free);
  throw Error(anyflow_error_code(error), anyflow_error_text(error));
}

template <typename T, void (*Free)(T*)>
struct Freeing {
  void operator()(T* handle) const { Free(handle); }
};
template <typename T, void (*Free)(T*)>
using Handle = std::unique_ptr<T, Freeing<T, Free>>;

// A contiguous float32 array.
template <std::size_t Axes>
struct Array {
  std::array<std::int64_t, Axes> shape{};
  std::vector<float> data;

  Array() = default;
  explicit Array(const std::array<std::int64_t, Axes>& sizes) : shape(sizes) {
    std::size_t count = 1;
    for (const std::int64_t size : sizes) {
      if (size < 0)
        throw Error(ANYFLOW_SHAPE, "an array with an axis of " + std::to_string(size) + "; sizes are whole numbers from 0.");
      count *= static_cast<std::size_t>(size);
    }
    data.resize(count);
  }
  Array(const std::array<std::int64_t, Axes>& sizes, std::vector<float> values) : shape(sizes), data(std::move(values)) {
    if (Array(sizes).data.size() != data.size())
      throw Error(ANYFLOW_SHAPE, "an array has another number of values than its shape.");
  }
};
using Latents = Array<5>;  // (batch, frames, channels, height, width)
using Text = Array<3>;     // (batch, tokens, channels)

// Standard normal latents, the same as in Python.
inline Latents noise(const std::array<std::int64_t, 5>& shape, std::uint64_t seed) {
  Latents latents(shape);
  if (!latents.data.empty()) check(anyflow_noise(seed, latents.data.data(), latents.data.size()));
  return latents;
}

template <std::size_t Axes>
Array<Axes> load(const std::string& path, const std::string& name) {
  anyflow_tensor* raw = nullptr;
  check(anyflow_tensor_load(path.c_str(), name.c_str(), &raw));
  const Handle<anyflow_tensor, anyflow_tensor_free> tensor(raw);
  std::size_t axes = 0;
  const std::int64_t* shape = anyflow_tensor_shape(raw, &axes);
  if (axes != Axes) {
    throw Error(ANYFLOW_SHAPE,
                path + ": " + name + " has " + std::to_string(axes) + " axes; expected are " + std::to_string(Axes) + ".");
  }
  Array<Axes> array;
  for (std::size_t i = 0; i < Axes; ++i) array.shape[i] = shape[i];
  std::size_t count = 1;
  for (const std::int64_t size : array.shape) count *= static_cast<std::size_t>(size);
  array.data.assign(anyflow_tensor_data(raw), anyflow_tensor_data(raw) + count);
  return array;
}

template <std::size_t Axes>
void save(const std::string& path, const std::string& name, const Array<Axes>& array) {
  check(anyflow_tensor_save(path.c_str(), name.c_str(), array.data.data(), array.shape.data(), Axes));
}

class Bundle {
 public:
  explicit Bundle(const std::string& path, const anyflow_bundle_params* params = nullptr) {
    anyflow_bundle* raw = nullptr;
    check(anyflow_bundle_open(path.c_str(), params, &raw));
    handle_.reset(raw);
  }
  const anyflow_bundle* get() const { return handle_.get(); }
  anyflow_bundle_info info() const {
    anyflow_bundle_info info = ANYFLOW_INIT(anyflow_bundle_info);
    check(anyflow_bundle_get_info(get(), &info));
    return info;
  }
  anyflow_range range(const std::string& axis) const {
    anyflow_range range = ANYFLOW_INIT(anyflow_range);
    check(anyflow_bundle_get_range(get(), axis.c_str(), &range));
    return range;
  }

 private:
  Handle<anyflow_bundle, anyflow_bundle_close> handle_;
};

class Schedule {
 public:
  static Schedule uniform(std::int64_t steps, double shift = 5.0) {
    return made([&](anyflow_schedule** raw) { return anyflow_schedule_uniform(steps, shift, raw); });
  }
  static Schedule from_sigmas(const std::vector<double>& sigmas, double shift = 1.0) {
    return made([&](anyflow_schedule** raw) { return anyflow_schedule_from_sigmas(sigmas.data(), sigmas.size(), shift, raw); });
  }
  static Schedule from_timesteps(const std::vector<double>& timesteps) {
    return made([&](anyflow_schedule** raw) { return anyflow_schedule_from_timesteps(timesteps.data(), timesteps.size(), raw); });
  }
  const anyflow_schedule* get() const { return handle_.get(); }
  std::vector<double> timesteps() const {
    std::size_t count = 0;
    const double* values = anyflow_schedule_timesteps(get(), &count);
    return {values, values + count};
  }

 private:
  template <typename Make>
  static Schedule made(Make make) {
    anyflow_schedule* raw = nullptr;
    check(make(&raw));
    Schedule schedule;
    schedule.handle_ = std::shared_ptr<anyflow_schedule>(raw, anyflow_schedule_free);
    return schedule;
  }
  Schedule() = default;
  std::shared_ptr<anyflow_schedule> handle_;
};

// Seconds a transition takes; share one between all requests on an engine.
class Pace {
 public:
  Pace() {
    anyflow_pace* raw = nullptr;
    check(anyflow_pace_create(&raw));
    handle_ = std::shared_ptr<anyflow_pace>(raw, anyflow_pace_free);
  }
  anyflow_pace* get() const { return handle_.get(); }

 private:
  std::shared_ptr<anyflow_pace> handle_;
};

// In place of a schedule: as many steps as the time allows.
struct Deadline {
  double seconds = 0;
  double shift = 5.0;
  std::int64_t most = 50;
  std::optional<Pace> pace = std::nullopt;
  std::function<bool()> enough = nullptr;   // true: finish now, with one jump
  std::function<double()> clock = nullptr;  // for tests
};

// A transition that was just made.
class Step {
 public:
  explicit Step(const anyflow_step* raw) : raw_(raw) {}
  std::int64_t index() const { return raw_->index; }
  std::int64_t steps() const { return raw_->steps; }
  double t() const { return raw_->t; }
  double r() const { return raw_->r; }
  Latents read() const {
    Latents state({raw_->shape[0], raw_->shape[1], raw_->shape[2], raw_->shape[3], raw_->shape[4]});
    check(anyflow_step_read(raw_, state.data.data()));
    return state;
  }

 private:
  const anyflow_step* raw_;
};

// How to sample: by a schedule, under a deadline, or (with neither) as the bundle says.
struct Sampling {
  std::optional<Schedule> schedule = std::nullopt;
  std::optional<Deadline> deadline = std::nullopt;
  std::function<void(const Step&)> on_step = nullptr;
  std::function<bool()> abort = nullptr;
  std::function<void(const anyflow_outcome&)> on_end = nullptr;

  Sampling() = default;
  Sampling(Schedule by) : schedule(std::move(by)) {}          // NOLINT: a schedule is a way to sample
  Sampling(Deadline within) : deadline(std::move(within)) {}  // NOLINT
};

namespace detail {

// A Sampling as the C header wants it. What a callback throws is kept, everything is ended, and `check` throws it again.
class Call {
 public:
  explicit Call(const Sampling& sampling) : sampling_(sampling) {
    params_.schedule = sampling.schedule ? sampling.schedule->get() : nullptr;
    if (sampling.deadline) {
      const Deadline& given = *sampling.deadline;
      deadline_.seconds = given.seconds, deadline_.shift = given.shift, deadline_.most = given.most;
      deadline_.pace = given.pace ? given.pace->get() : nullptr;
      if (given.enough) deadline_.enough = [](void* user) { return of(user).asked(of(user).sampling_.deadline->enough); };
      if (given.clock) deadline_.clock = [](void* user) { return of(user).told(of(user).sampling_.deadline->clock); };
      deadline_.user = this;
      params_.deadline = &deadline_;
    }
    if (sampling.on_step) {
      params_.on_step = [](const anyflow_step* step, void* user) {
        of(user).kept([&] { of(user).sampling_.on_step(Step(step)); });
      };
    }
    if (sampling.on_end) {
      params_.on_end = [](const anyflow_outcome* outcome, void* user) {
        of(user).kept([&] { of(user).sampling_.on_end(*outcome); });
      };
    }
    params_.abort = [](void* user) { return of(user).thrown_ || of(user).asked(of(user).sampling_.abort) ? 1 : 0; };
    params_.user = this;
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  const anyflow_sample_params* params() const { return &params_; }
  void check(anyflow_error* error) const {
    if (thrown_) {
      anyflow_error_free(error);
      std::rethrow_exception(thrown_);
    }
    anyflow::check(error);
  }

 private:
  static Call& of(void* user) { return *static_cast<Call*>(user); }
  template <typename F>
  void kept(F work) noexcept {
    try {
      work();
    } catch (...) {
      if (!thrown_) thrown_ = std::current_exception();
    }
  }
  int asked(const std::function<bool()>& question) noexcept {
    bool answer = false;
    if (question) kept([&] { answer = question(); });
    return answer ? 1 : 0;
  }
  double told(const std::function<double()>& clock) noexcept {
    double now = 0;
    kept([&] { now = clock(); });
    return now;
  }

  const Sampling& sampling_;
  anyflow_sample_params params_ = ANYFLOW_INIT(anyflow_sample_params);
  anyflow_deadline deadline_ = ANYFLOW_INIT(anyflow_deadline);
  std::exception_ptr thrown_;
};

}  // namespace detail

struct EngineOptions {
  std::string backend, provider, engine;  // "": chosen by the library
  int device = 0;
  int threads = 0;
  bool skip_hashes = false;
  bool cuda_graphs = true;
};

// One sample, step by step.
class Run {
 public:
  Run(anyflow_run* raw, const std::array<std::int64_t, 5>& shape) : handle_(raw), shape_(shape) {}
  // t, r: one number, or one for each of (batch, frames).
  void step(const std::vector<float>& t, const std::vector<float>& r) {
    same(t, r);
    check(anyflow_run_step(handle_.get(), t.data(), r.data(), t.size()));
  }
  Latents velocity(const std::vector<float>& t, const std::vector<float>& r) {
    same(t, r);
    Latents velocity(shape_);
    check(anyflow_run_velocity(handle_.get(), t.data(), r.data(), t.size(), velocity.data.data()));
    return velocity;
  }
  Latents read() {
    Latents state(shape_);
    check(anyflow_run_read(handle_.get(), state.data.data()));
    return state;
  }

 private:
  static void same(const std::vector<float>& t, const std::vector<float>& r) {
    if (t.size() != r.size()) throw Error(ANYFLOW_SHAPE, "t and r have different numbers of times.");
  }
  Handle<anyflow_run, anyflow_run_close> handle_;
  std::array<std::int64_t, 5> shape_;
};

// A finished piece of a video.
struct Chunk {
  std::int64_t index, first_frame;
  bool given;
  Latents latents;
};

struct StreamOptions {
  std::vector<std::int64_t> chunk_plan;  // empty: the model's own
  std::int64_t window = 0;               // 0: everything is kept
  std::optional<Latents> context = std::nullopt;
};

class Stream {
 public:
  Stream(anyflow_stream* raw, const std::array<std::int64_t, 5>& shape) : handle_(raw), shape_(shape) {}
  // Nothing when the video is complete.
  std::optional<Chunk> next(const Sampling& sampling = {}) {
    anyflow_chunk chunk = ANYFLOW_INIT(anyflow_chunk);
    int made = 0;
    const detail::Call call(sampling);
    call.check(anyflow_stream_next(handle_.get(), call.params(), &chunk, &made));
    if (!made) return std::nullopt;
    Latents latents({1, chunk.frames, shape_[2], shape_[3], shape_[4]});
    latents.data.assign(chunk.latents, chunk.latents + latents.data.size());
    return Chunk{chunk.index, chunk.first_frame, chunk.given != 0, std::move(latents)};
  }

 private:
  Handle<anyflow_stream, anyflow_stream_close> handle_;
  std::array<std::int64_t, 5> shape_;
};

class Engine {
 public:
  explicit Engine(const Bundle& bundle, const EngineOptions& options = {}) {
    anyflow_engine_params params = ANYFLOW_INIT(anyflow_engine_params);
    const auto word = [](const std::string& text) { return text.empty() ? nullptr : text.c_str(); };
    params.backend = word(options.backend), params.provider = word(options.provider), params.engine = word(options.engine);
    params.device = options.device, params.threads = options.threads;
    params.skip_hashes = options.skip_hashes, params.no_cuda_graphs = !options.cuda_graphs;
    anyflow_engine* raw = nullptr;
    check(anyflow_engine_open(bundle.get(), &params, &raw));
    handle_.reset(raw);
  }
  std::string description() const { return anyflow_engine_description(handle_.get()); }

  Latents sample(const Latents& noise, const Text& text, const Sampling& sampling = {}) {
    Latents clean(noise.shape);
    const detail::Call call(sampling);
    call.check(anyflow_sample(handle_.get(), noise.data.data(), noise.shape.data(), text.data.data(), text.shape.data(),
                              call.params(), clean.data.data()));
    return clean;
  }
  Run start(const Latents& latents, const Text& text) {
    anyflow_run* raw = nullptr;
    check(anyflow_run_start(handle_.get(), latents.data.data(), latents.shape.data(), text.data.data(), text.shape.data(), &raw));
    return Run(raw, latents.shape);
  }
  Stream stream(const Latents& noise, const Text& text, const StreamOptions& options = {}) {
    anyflow_stream_params params = ANYFLOW_INIT(anyflow_stream_params);
    if (!options.chunk_plan.empty())
      params.chunk_plan = options.chunk_plan.data(), params.chunk_count = options.chunk_plan.size();
    params.window = options.window;
    if (options.context) {
      const auto& given = options.context->shape;
      if (given[0] != 1 || given[2] != noise.shape[2] || given[3] != noise.shape[3] || given[4] != noise.shape[4]) {
        throw Error(ANYFLOW_SHAPE, "context and noise may differ in frames only.");
      }
      params.context = options.context->data.data(), params.context_frames = given[1];
    }
    anyflow_stream* raw = nullptr;
    check(anyflow_stream_open(handle_.get(), noise.data.data(), noise.shape.data(), text.data.data(), text.shape.data(), &params,
                              &raw));
    return Stream(raw, noise.shape);
  }

 private:
  Handle<anyflow_engine, anyflow_engine_close> handle_;
};

}  // namespace anyflow
