#include "sampler.hpp"

#include <algorithm>
#include <set>

#include "error.hpp"
#include "files.hpp"

namespace af {
namespace {

void step(Run& run, double t, double r) {
  const auto source = static_cast<float>(t), target = static_cast<float>(r);
  run.step({&source, 1}, {&target, 1});
}

void report(const Sampling& sampling, Step made) {
  if (sampling.on_step) sampling.on_step(made);
}

void by_schedule(Run& run, const Schedule& schedule, const Sampling& sampling, float* clean) {
  const auto& times = schedule.timesteps();
  for (size_t i = 0; i + 1 < times.size(); ++i) {
    check_abort(sampling.abort, "sampling");
    step(run, times[i], times[i + 1]);
    report(sampling, {static_cast<int64_t>(i), schedule.steps(), times[i], times[i + 1], run.shape(),
                      [&](float* into) { run.read(into); }});
  }
  run.read(clean);
}

void in_time(Run& run, const Deadline& deadline, const Sampling& sampling, float* clean) {
  Route route(deadline, Shape(run.shape().begin(), run.shape().end()));
  std::vector<float> draft;
  check_abort(sampling.abort, "sampling");
  if (!route.known()) {
    draft.resize(elements(run.shape()));
    const float noise = static_cast<float>(train_timesteps), end = 0;
    route.timed([&] { run.velocity({&noise, 1}, {&end, 1}, draft.data()); });
  }
  const auto ended = [&](int64_t steps, bool threw_draft_away) {
    if (sampling.on_end) sampling.on_end(route.ended(steps, threw_draft_away));
  };
  while (route.t > 0.0) {
    check_abort(sampling.abort, "sampling");
    const double t = route.t, r = route.next();
    if (!draft.empty() && route.made == 0 && r == 0.0) {  // the draft made this very transition
      std::vector<float> state(draft.size());
      run.read(state.data());
      for (size_t i = 0; i < state.size(); ++i) clean[i] = state[i] - draft[i];
      ended(1, false);
      report(sampling, {0, 1, t, r, run.shape(), [&](float* into) { std::copy_n(clean, draft.size(), into); }});
      return;
    }
    route.timed([&] { step(run, t, r); });
    route.went(r);
    report(sampling, {route.made - 1, route.planned, t, r, run.shape(), [&](float* into) { run.read(into); }});
  }
  run.read(clean);
  ended(route.made, !draft.empty());
}

}  // namespace

void sample(Run& run, const Sampling& sampling, float* clean) {
  if (const auto* schedule = std::get_if<Schedule>(&sampling.course)) {
    by_schedule(run, *schedule, sampling, clean);
  } else {
    in_time(run, std::get<Deadline>(sampling.course), sampling, clean);
  }
}

Video::Video(std::shared_ptr<Engine> engine, const Latents& noise, const Text& text, const Options& options)
    : engine_(std::move(engine)), shape_(noise.shape), text_shape_(text.shape) {
  const Architecture& a = engine_->bundle().manifest.architecture;
  check_latents("latents", noise);
  if (shape_[0] != 1) {
    throw Error(ANYFLOW_SHAPE,
                "latents have shape " + tuple(shape_) + "; a stream takes (1, frames, channels, height, width): one video.");
  }
  if (!a.causal)
    throw Error(ANYFLOW_INVALID,
                engine_->bundle().path.string() + " is a bidirectional model: use anyflow_sample, not a stream.");
  engine_->check_text(text);
  plan_ = CachePlan::make(a, options.chunk_plan, shape_[3], shape_[4], options.window, text.shape[1]);
  if (plan_.frames() != shape_[1]) {
    throw Error(ANYFLOW_SHAPE, "the chunk plan " + list(std::span<const int64_t>(plan_.chunks)) + " has " +
                                   std::to_string(plan_.frames()) + " latent frames and latents have " +
                                   std::to_string(shape_[1]) + "; give a chunk_plan that sums to the frames.");
  }
  for (const int64_t frames : std::set<int64_t>(plan_.chunks.begin(), plan_.chunks.end())) {
    engine_->ranges().check({1, frames, shape_[2], shape_[3], shape_[4]}, text.shape);
  }
  if (shape_[2] != a.in_channels) {
    throw Error(ANYFLOW_SHAPE, "latents has " + std::to_string(shape_[2]) + " channels on axis 2; this model takes " +
                                   std::to_string(a.in_channels) + ".");
  }
  check_context(options);
  engine_->check_stream(shape_, text_shape_, plan_, given_);
  noise_.assign(noise.data, noise.data + noise.count());
  text_.assign(text.data, text.data + text.count());
}

void Video::check_context(const Options& options) {
  if (!options.context) return;
  std::vector<int64_t> borders;
  for (int64_t chunk = 1; chunk <= plan_.count(); ++chunk) borders.push_back(plan_.first_frame(chunk));
  const auto found = std::find(borders.begin(), borders.end(), options.context_frames);
  if (found == borders.end()) {
    throw Error(ANYFLOW_SHAPE, "context has " + std::to_string(options.context_frames) +
                                   " latent frames, which is not where a chunk ends (" + list(std::span<const int64_t>(borders)) +
                                   "). Shorten it, or give a chunk_plan whose first chunks it fills.");
  }
  const Latents context{options.context, {1, options.context_frames, shape_[2], shape_[3], shape_[4]}};
  check_latents("context", context);
  context_.assign(context.data, context.data + context.count());
  given_ = found - borders.begin() + 1;
}

const Chunk* Video::next(const Sampling& sampling) {
  if (!memory_) memory_ = std::make_unique<CacheStream>(engine_->open_cache({text_.data(), text_shape_}, plan_), plan_);
  if (index_ == plan_.count()) return nullptr;
  const auto shape_of = [&](int64_t frames) { return LatentShape{1, frames, shape_[2], shape_[3], shape_[4]}; };
  if (broken_) throw Error(ANYFLOW_INVALID, "this stream failed while it remembered a chunk; open another.");
  if (!remembered_) {
    broken_ = true;  // until it is done
    memory_->remember(last_->latents, shape_of(last_->frames));
    broken_ = false, remembered_ = true;
  }
  const bool given = index_ < given_;
  const int64_t frames = plan_.chunks[static_cast<size_t>(index_)];
  std::vector<float> latents = frames_of(given ? context_ : noise_, index_);
  if (!given) {
    const auto run = memory_->start({latents.data(), shape_of(frames)});
    sample(*run, sampling, latents.data());
  }
  last_ = Chunk{index_, plan_.first_frame(index_), frames, given, std::move(latents)};
  remembered_ = false;
  ++index_;
  return &*last_;
}

std::vector<float> Video::frames_of(const std::vector<float>& video, int64_t chunk) const {
  const int64_t frame = shape_[2] * shape_[3] * shape_[4];
  return {video.begin() + plan_.first_frame(chunk) * frame, video.begin() + plan_.first_frame(chunk + 1) * frame};
}

}  // namespace af
