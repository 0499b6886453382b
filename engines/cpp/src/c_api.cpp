// The C border: handles, structs and errors in, calls of the library out. Nothing is thrown across it.
#include <array>
#include <chrono>
#include <cstring>
#include <new>

#include "anyflow/anyflow.h"
#include "c_handles.hpp"
#include "error.hpp"
#include "noise.hpp"
#include "params.hpp"
#include "safetensors.hpp"
#include "sampler.hpp"

using namespace af;

namespace {

// Handed out where there is no memory for an error; never freed.
anyflow_error no_memory{ANYFLOW_OUT_OF_MEMORY, "there is no memory left on the host."};

anyflow_error* made_error(anyflow_code code, const char* text) {
  try {
    return new anyflow_error{code, text};
  } catch (const std::bad_alloc&) {
    return &no_memory;
  }
}

// Runs what may throw.
template <typename F>
anyflow_error* guarded(F work) {
  try {
    work();
    return nullptr;
  } catch (const Error& error) {
    return made_error(error.code, error.what());
  } catch (const std::bad_alloc&) {
    return &no_memory;
  } catch (const std::exception& error) {
    return made_error(ANYFLOW_INTERNAL, error.what());
  } catch (...) {
    return made_error(ANYFLOW_INTERNAL, "an error that is no exception; please report what you did.");
  }
}

template <typename T>
T& given(const char* name, T* pointer) {
  if (!pointer) throw Error(ANYFLOW_INVALID, std::string(name) + " is NULL.");
  return *pointer;
}

std::string text_or_empty(const char* text) { return text ? text : ""; }

template <size_t N>
std::array<int64_t, N> shape_of(const char* name, const int64_t* shape) {
  given(name, shape);
  std::array<int64_t, N> copy{};
  std::copy_n(shape, N, copy.begin());
  return copy;
}

Watch watch_of(const anyflow_bundle_params& params) {
  Watch watch;
  watch.skip_hashes = params.skip_hashes != 0;
  if (params.progress) watch.progress = [params](uint64_t done, uint64_t total) { params.progress(done, total, params.user); };
  if (params.abort) watch.abort = [params] { return params.abort(params.user) != 0; };
  return watch;
}

double steady_seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

Deadline deadline_of(const anyflow_deadline& given) {
  Deadline deadline;
  deadline.seconds = given.seconds;
  if (given.shift != 0) deadline.shift = given.shift;
  if (given.most != 0) deadline.most = given.most;
  deadline.pace = given.pace ? given.pace->pace : std::make_shared<Pace>();
  deadline.enough = [given] { return given.enough && given.enough(given.user) != 0; };
  deadline.clock = [given] { return given.clock ? given.clock(given.user) : steady_seconds(); };
  deadline.check();
  return deadline;
}

Course course_of(const anyflow_sample_params& params, const Manifest& manifest) {
  if (params.schedule && params.deadline)
    throw Error(ANYFLOW_INVALID, "a schedule and a deadline were given; allowed is one of them.");
  if (params.schedule) return params.schedule->schedule;
  if (params.deadline) return deadline_of(taken("anyflow_deadline", params.deadline));
  return Schedule::uniform(manifest.steps, manifest.shift);
}

Sampling sampling_of(const anyflow_sample_params* given_params, const Manifest& manifest) {
  const anyflow_sample_params params = taken("anyflow_sample_params", given_params);
  Sampling sampling{course_of(params, manifest), {}, {}, {}};
  if (params.on_step) {
    sampling.on_step = [params](const Step& step) {
      anyflow_step made{sizeof(anyflow_step), step.index, step.steps, step.t, step.r, {}, &step};
      std::copy(step.shape.begin(), step.shape.end(), made.shape);
      params.on_step(&made, params.user);
    };
  }
  if (params.abort) sampling.abort = [params] { return params.abort(params.user) != 0; };
  if (params.on_end) {
    sampling.on_end = [params](const Outcome& outcome) {
      const anyflow_outcome told{sizeof(anyflow_outcome), outcome.steps, outcome.draft, outcome.seconds, outcome.deadline};
      params.on_end(&told, params.user);
    };
  }
  return sampling;
}

std::vector<int64_t> plan_of(const anyflow_stream_params& params) {
  if (!params.chunk_plan) return {};
  if (params.chunk_count == 0)
    throw Error(ANYFLOW_INVALID, "chunk plan []: allowed are one or more positive whole numbers of latent frames.");
  return {params.chunk_plan, params.chunk_plan + params.chunk_count};
}

std::optional<int64_t> window_of(const anyflow_stream_params& params) {
  return params.window == 0 ? std::nullopt : std::optional<int64_t>(params.window);
}

std::unique_ptr<Run> started(const anyflow_engine& engine, const float* latents, const int64_t* shape, const float* text,
                             const int64_t* text_shape) {
  return engine.engine->start({latents, shape_of<5>("shape", shape)}, {text, shape_of<3>("text_shape", text_shape)});
}

// The place is looked at first: what is made would be lost.
void hand(anyflow_schedule** place, const std::function<Schedule()>& make) {
  given("schedule", place);
  *place = new anyflow_schedule{make()};
}

std::span<const double> numbers(const char* name, const double* values, size_t count) {
  if (count > 0) given(name, values);
  return {values, count};
}

}  // namespace

extern "C" {

const char* anyflow_version(void) { return ANYFLOW_VERSION; }

anyflow_code anyflow_error_code(const anyflow_error* error) { return error ? error->code : anyflow_code{}; }

const char* anyflow_error_text(const anyflow_error* error) { return error ? error->text.c_str() : ""; }

void anyflow_error_free(anyflow_error* error) {
  if (error != &no_memory) delete error;
}

anyflow_error* anyflow_bundle_open(const char* path, const anyflow_bundle_params* params, anyflow_bundle** bundle) {
  return guarded([&] {
    given("path", path), given("bundle", bundle);
    *bundle = new anyflow_bundle{Bundle::open(path, watch_of(taken("anyflow_bundle_params", params)))};
  });
}

void anyflow_bundle_close(anyflow_bundle* bundle) { delete bundle; }

anyflow_error* anyflow_bundle_get_info(const anyflow_bundle* bundle, anyflow_bundle_info* info) {
  return guarded([&] {
    const Bundle& b = *given("bundle", bundle).bundle;
    const Manifest& m = b.manifest;
    const VideoFormat& v = m.video;
    anyflow_bundle_info told{};
    told.kind = m.kind.c_str(), told.model = m.model.c_str(), told.precision = m.precision.c_str(),
    told.digest = b.digest.c_str();
    told.channels = m.architecture.in_channels, told.text_channels = m.architecture.text_channels,
    told.text_tokens = v.text_tokens;
    told.shift = m.shift, told.steps = m.steps;
    told.frames = (v.frames - 1) / v.temporal_factor + 1, told.height = v.height / v.spatial_factor,
    told.width = v.width / v.spatial_factor;
    told.spatial_factor = v.spatial_factor, told.temporal_factor = v.temporal_factor, told.fps = v.fps;
    give("anyflow_bundle_info", told, info);
  });
}

anyflow_error* anyflow_bundle_get_range(const anyflow_bundle* bundle, const char* axis, anyflow_range* range) {
  return guarded([&] {
    const Range* found = given("bundle", bundle).bundle->manifest.ranges.find(&given("axis", axis));
    if (!found)
      throw Error(ANYFLOW_INVALID, "unknown axis " + in_quotes(axis) + ": allowed are batch, frames, height, width, text.");
    give("anyflow_range", anyflow_range{0, found->minimum, found->maximum.value_or(-1), found->multiple}, range);
  });
}

anyflow_error* anyflow_schedule_uniform(int64_t steps, double shift, anyflow_schedule** schedule) {
  return guarded([&] { hand(schedule, [&] { return Schedule::uniform(steps, shift); }); });
}

anyflow_error* anyflow_schedule_from_sigmas(const double* sigmas, size_t count, double shift, anyflow_schedule** schedule) {
  return guarded([&] { hand(schedule, [&] { return Schedule::from_sigmas(numbers("sigmas", sigmas, count), shift); }); });
}

anyflow_error* anyflow_schedule_from_timesteps(const double* timesteps, size_t count, anyflow_schedule** schedule) {
  return guarded([&] { hand(schedule, [&] { return Schedule::from_timesteps(numbers("timesteps", timesteps, count)); }); });
}

const double* anyflow_schedule_timesteps(const anyflow_schedule* schedule, size_t* count) {
  if (count) *count = schedule ? schedule->schedule.timesteps().size() : 0;
  return schedule ? schedule->schedule.timesteps().data() : nullptr;
}

void anyflow_schedule_free(anyflow_schedule* schedule) { delete schedule; }

anyflow_error* anyflow_pace_create(anyflow_pace** pace) {
  return guarded([&] {
    given("pace", pace);
    *pace = new anyflow_pace{std::make_shared<Pace>()};
  });
}

void anyflow_pace_free(anyflow_pace* pace) { delete pace; }

size_t anyflow_backends(const char* const** names) {
  static const std::vector<const char*> all = [] {
    std::vector<const char*> found;
    for (const Backend& backend : backends()) found.push_back(backend.name);
    return found;
  }();
  if (names) *names = all.data();
  return all.size();
}

anyflow_error* anyflow_engine_open(const anyflow_bundle* bundle, const anyflow_engine_params* params, anyflow_engine** engine) {
  return guarded([&] {
    const anyflow_engine_params wanted = taken("anyflow_engine_params", params);
    given("engine", engine);
    EngineOptions options;
    options.provider = text_or_empty(wanted.provider), options.engine = text_or_empty(wanted.engine);
    options.device = wanted.device, options.threads = wanted.threads, options.cuda_graphs = !wanted.no_cuda_graphs;
    options.watch.skip_hashes = wanted.skip_hashes != 0;
    *engine = new anyflow_engine{open_engine(given("bundle", bundle).bundle, text_or_empty(wanted.backend), options)};
  });
}

const char* anyflow_engine_description(const anyflow_engine* engine) {
  return engine ? engine->engine->description().c_str() : "";
}

void anyflow_engine_close(anyflow_engine* engine) { delete engine; }

anyflow_error* anyflow_step_read(const anyflow_step* step, float* latents) {
  return guarded([&] { static_cast<const Step*>(given("step", step).state)->read(&given("latents", latents)); });
}

anyflow_error* anyflow_sample(anyflow_engine* engine, const float* noise, const int64_t shape[5], const float* text,
                              const int64_t text_shape[3], const anyflow_sample_params* params, float* clean) {
  return guarded([&] {
    given("engine", engine), given("clean", clean);
    const Sampling sampling = sampling_of(params, engine->engine->bundle().manifest);
    const auto run = started(*engine, noise, shape, text, text_shape);
    sample(*run, sampling, clean);
  });
}

anyflow_error* anyflow_run_start(anyflow_engine* engine, const float* latents, const int64_t shape[5], const float* text,
                                 const int64_t text_shape[3], anyflow_run** run) {
  return guarded([&] {
    given("run", run);
    *run = new anyflow_run{given("engine", engine).engine, started(*engine, latents, shape, text, text_shape)};
  });
}

anyflow_error* anyflow_run_step(anyflow_run* run, const float* t, const float* r, size_t count) {
  return guarded([&] { given("run", run).run->step({&given("t", t), count}, {&given("r", r), count}); });
}

anyflow_error* anyflow_run_velocity(anyflow_run* run, const float* t, const float* r, size_t count, float* velocity) {
  return guarded(
      [&] { given("run", run).run->velocity({&given("t", t), count}, {&given("r", r), count}, &given("velocity", velocity)); });
}

anyflow_error* anyflow_run_read(anyflow_run* run, float* latents) {
  return guarded([&] { given("run", run).run->read(&given("latents", latents)); });
}

void anyflow_run_close(anyflow_run* run) { delete run; }

anyflow_error* anyflow_cache_plan(const anyflow_bundle* bundle, const anyflow_stream_params* params, int64_t height,
                                  int64_t width, int64_t text_tokens, anyflow_cache_size* size) {
  return guarded([&] {
    const Manifest& manifest = given("bundle", bundle).bundle->manifest;
    const anyflow_stream_params wanted = taken("anyflow_stream_params", params);
    const CachePlan plan = CachePlan::make(manifest.architecture, plan_of(wanted), height, width, window_of(wanted), text_tokens);
    const int64_t element = element_bytes(cache_type(manifest));
    give("anyflow_cache_size", anyflow_cache_size{0, plan.frames(), plan.capacity(), plan.bytes(element), plan.encoded_tokens()},
         size);
  });
}

anyflow_error* anyflow_stream_open(anyflow_engine* engine, const float* noise, const int64_t shape[5], const float* text,
                                   const int64_t text_shape[3], const anyflow_stream_params* params, anyflow_stream** stream) {
  return guarded([&] {
    const anyflow_stream_params wanted = taken("anyflow_stream_params", params);
    given("engine", engine), given("stream", stream);
    const Video::Options options{plan_of(wanted), window_of(wanted), wanted.context, wanted.context_frames};
    *stream = new anyflow_stream{
        Video(engine->engine, {noise, shape_of<5>("shape", shape)}, {text, shape_of<3>("text_shape", text_shape)}, options),
        engine->engine};
  });
}

anyflow_error* anyflow_stream_next(anyflow_stream* stream, const anyflow_sample_params* params, anyflow_chunk* chunk, int* made) {
  return guarded([&] {
    given("stream", stream), given("chunk", chunk), given("made", made);
    check_size("anyflow_chunk", chunk->struct_size);
    const Chunk* next = stream->video.next(sampling_of(params, stream->engine->bundle().manifest));
    *made = next != nullptr;
    if (next) {
      give("anyflow_chunk", anyflow_chunk{0, next->index, next->first_frame, next->frames, next->given, next->latents.data()},
           chunk);
    }
  });
}

void anyflow_stream_close(anyflow_stream* stream) { delete stream; }

anyflow_error* anyflow_noise(uint64_t seed, float* values, size_t count) {
  return guarded([&] { fill_noise(seed, &given("values", values), count); });
}

anyflow_error* anyflow_tensor_load(const char* path, const char* name, anyflow_tensor** tensor) {
  return guarded([&] {
    given("path", path), given("name", name), given("tensor", tensor);
    Safetensors file(path);
    const Stored* stored = file.find(name);
    if (!stored || stored->type != "F32") {
      std::string names;
      for (const auto& [key, item] : file.index()) names += (names.empty() ? "" : ", ") + key + " (" + item.type + ")";
      throw Error(ANYFLOW_INVALID, std::string(path) + " holds no float32 tensor " + in_quotes(name) + ": it holds " +
                                       (names.empty() ? "nothing" : names) + ".");
    }
    auto loaded = std::make_unique<anyflow_tensor>();
    loaded->shape = stored->shape, loaded->data.resize(stored->bytes / sizeof(float));
    file.read(*stored, loaded->data.data());
    *tensor = loaded.release();
  });
}

const float* anyflow_tensor_data(const anyflow_tensor* tensor) { return tensor ? tensor->data.data() : nullptr; }

const int64_t* anyflow_tensor_shape(const anyflow_tensor* tensor, size_t* axes) {
  if (axes) *axes = tensor ? tensor->shape.size() : 0;
  return tensor ? tensor->shape.data() : nullptr;
}

void anyflow_tensor_free(anyflow_tensor* tensor) { delete tensor; }

anyflow_error* anyflow_tensor_save(const char* path, const char* name, const float* data, const int64_t* shape, size_t axes) {
  return guarded([&] {
    given("path", path), given("name", name), given("data", data), given("shape", shape);
    save_tensor(path, name, data, {shape, shape + axes});
  });
}

}  // extern "C"
