#include "tensorrt_cache.hpp"

#include <algorithm>

#include "stream.hpp"

namespace af::trt {
namespace {

const std::string past_prefix = "past_", text_prefix = "text_";

Dims dims(const LatentShape& shape) { return {shape.begin(), shape.end()}; }
Dims frames(const LatentShape& shape) { return {shape[0], shape[1]}; }
size_t floats(size_t count) { return count * sizeof(float); }

// Asks a stream's plans, as the stream will, whether they take what they will be given.
class Asking final : public Cache {
 public:
  Asking(const Plans& plans, const CachePlan& plan) : plans_(plans), plan_(plan) {}

  std::unique_ptr<Run> run(const Latents& noise, const std::vector<int64_t>&, int64_t past) override {
    ask("chunk", noise.shape, past);
    return nullptr;
  }
  void write(const std::string& graph, const Latents& clean, const std::vector<int64_t>&, int64_t past, int64_t) override {
    ask(graph, clean.shape, past);
  }
  void move(int64_t, int64_t, int64_t) override {}

 private:
  void ask(const std::string& graph, const LatentShape& shape, int64_t past) const {
    const Plan& plan = plan_of(plans_, graph);
    Shapes shapes;
    for (const Tensor& tensor : plan.graph.inputs) {
      if (tensor.name.starts_with(past_prefix)) {
        shapes[tensor.name] = {1, past, plan_.heads, plan_.channels};
      } else if (tensor.name.starts_with(text_prefix)) {
        shapes[tensor.name] = {1, plan_.text_tokens, plan_.heads, plan_.channels};
      } else {
        shapes[tensor.name] = tensor.name == "latents"     ? dims(shape)
                              : tensor.name == "positions" ? Dims{shape[1]}
                                                           : frames(shape);
      }
    }
    plan.chosen(shapes);
  }

  const Plans& plans_;
  const CachePlan& plan_;
};

}  // namespace

const Plan& plan_of(const Plans& plans, const std::string& graph) {
  const auto found = plans.find(graph);
  if (found == plans.end()) {
    throw Error(ANYFLOW_SHAPE, "this engine was built without " + in_quotes(graph) +
                                   ", which the video sizes it was built for do not need. Build one with --shapes "
                                   "HEIGHTxWIDTHxFRAMES for longer videos.");
  }
  return *found->second;
}

void check_stream(const Plans& plans, const LatentShape& shape, const TextShape& text, const CachePlan& plan, int64_t given) {
  plan_of(plans, "text").chosen({{"text", Dims(text.begin(), text.end())}});
  CacheStream stream(std::make_unique<Asking>(plans, plan), plan);
  for (int64_t chunk = 0; chunk < plan.count(); ++chunk) {
    const LatentShape piece = {1, plan.chunks[static_cast<size_t>(chunk)], shape[2], shape[3], shape[4]};
    if (chunk >= given) stream.start({nullptr, piece});
    if (chunk + 1 < plan.count()) stream.remember({}, piece);
  }
}

Call taken_by(const Plan& plan, Call call) {
  Call taken;
  const auto missing = [&](const std::string& name) {
    return plan.refused("be given " + name + ", which its manifest lists and this library does not know");
  };
  for (const Tensor& tensor : plan.graph.inputs) {
    if (!call.shapes.contains(tensor.name) || !call.addresses.contains(tensor.name)) throw missing(tensor.name);
    taken.shapes[tensor.name] = call.shapes[tensor.name], taken.addresses[tensor.name] = call.addresses[tensor.name];
  }
  for (const Tensor& tensor : plan.graph.outputs) {
    if (!call.addresses.contains(tensor.name)) throw missing(tensor.name);
    taken.addresses[tensor.name] = call.addresses[tensor.name];
  }
  return taken;
}

TensorRtRun::TensorRtRun(std::shared_ptr<Lane> lane, const Plan& plan, const Latents& latents, Others others,
                         std::function<void()> closed)
    : Run(latents.shape), lane_(std::move(lane)), plan_(plan), others_(std::move(others)), closed_(std::move(closed)) {
  const size_t size = floats(latents.count()), times = floats(static_cast<size_t>(latents.shape[0] * latents.shape[1]));
  state_ = lane_->uploaded(latents.data, size), next_ = lane_->take(size), velocity_ = lane_->take(size);
  t_ = lane_->take(times), r_ = lane_->take(times);
  held_ = {state_, next_, velocity_, t_, r_};
}

TensorRtRun::~TensorRtRun() {
  try {
    lane_->queue().wait();
    lane_->give(held_);
    closed_();
  } catch (const std::exception& error) {
    log(ANYFLOW_LOG_ERROR, std::string("a run could not be ended in order: ") + error.what());
  }
}

void TensorRtRun::do_step(const std::vector<float>& t, const std::vector<float>& r) {
  transition(t, r);
  std::swap(state_, next_);
}

void TensorRtRun::do_velocity(const std::vector<float>& t, const std::vector<float>& r, float* into) {
  transition(t, r);
  download(*velocity_, into);
}

// One transition from the state, into the other buffer; it is there when this returns.
void TensorRtRun::transition(const std::vector<float>& t, const std::vector<float>& r) {
  Call call = others_();
  lane_->queue().upload(t_->at(), t.data(), t_->size());
  lane_->queue().upload(r_->at(), r.data(), r_->size());
  call.shapes["latents"] = dims(shape()), call.shapes["t"] = call.shapes["r"] = frames(shape());
  call.addresses["latents"] = state_->at(), call.addresses["t"] = t_->at(), call.addresses["r"] = r_->at();
  call.addresses["z_r"] = next_->at(), call.addresses["velocity"] = velocity_->at();
  lane_->run(plan_, taken_by(plan_, std::move(call)));
  lane_->queue().wait();
}

void TensorRtRun::download(const Buffer& buffer, float* into) {
  lane_->queue().download(into, buffer.at(), floats(elements(shape())));
  lane_->queue().wait();
}

TensorRtCache::TensorRtCache(std::shared_ptr<Lane> lane, const Plans& plans, const Text& text, const CachePlan& cache,
                             std::function<void()> closed)
    : lane_(std::move(lane)),
      plans_(plans),
      closed_(std::move(closed)),
      heads_(cache.heads),
      channels_(cache.channels),
      text_tokens_(text.shape[1]),
      full_tokens_(cache.full_tokens) {
  // What the chunk gives and takes back is what is cached. TensorRT writes every output, also while a chunk is made and nobody
  // wants its keys: there is room for one chunk more than is ever remembered.
  const int64_t longest = *std::max_element(cache.chunks.begin(), cache.chunks.end()) * full_tokens_;
  const Graph& chunk = plan_of(plans_, "chunk").graph;
  for (const Tensor& tensor : chunk.outputs) {
    const bool back = std::any_of(chunk.inputs.begin(), chunk.inputs.end(),
                                  [&](const Tensor& input) { return input.name == past_prefix + tensor.name; });
    if (!back) continue;
    const auto token = static_cast<size_t>(heads_ * channels_ * element_bytes(tensor.type));
    if (token_ && token != token_)
      throw Error(ANYFLOW_BUNDLE, "this bundle caches several types of numbers. Update the library.");
    token_ = token;
    held_.push_back(buffers_[tensor.name] = lane_->take(bytes(cache.capacity() + longest)));
    held_.push_back(words_[tensor.name] = lane_->take(bytes(text_tokens_)));
  }
  const Held given = lane_->uploaded(text.data, floats(text.count()));
  Call call{{{"text", Dims(text.shape.begin(), text.shape.end())}}, {{"text", given->at()}}};
  for (const auto& [name, buffer] : words_) call.addresses[text_prefix + name] = buffer->at();
  const Plan& words = plan_of(plans_, "text");
  lane_->run(words, taken_by(words, std::move(call)));
  lane_->queue().wait();
  lane_->give({given});
}

TensorRtCache::~TensorRtCache() {
  try {
    lane_->queue().wait();
    lane_->give(held_);
    closed_();
  } catch (const std::exception& error) {
    log(ANYFLOW_LOG_ERROR, std::string("a cache could not be given back in order: ") + error.what());
  }
}

std::unique_ptr<Run> TensorRtCache::run(const Latents& noise, const std::vector<int64_t>& positions, int64_t past) {
  const Plan& chunk = plan_of(plans_, "chunk");
  const auto beside = aside(past, noise.shape[1] * full_tokens_);
  const Held where = lane_->uploaded(positions.data(), positions.size() * sizeof(int64_t));
  const auto count = static_cast<int64_t>(positions.size());
  const Others others = [this, past, beside, where, count] {
    Call call = memory(past, beside);
    call.shapes["positions"] = {count}, call.addresses["positions"] = where->at();
    return call;
  };
  const auto closed = [lane = lane_, beside, where] {
    std::vector<Held> all;
    for (const auto& [name, buffer] : beside) all.push_back(buffer);
    all.push_back(where);
    lane->give(all);
  };
  return std::make_unique<TensorRtRun>(lane_, chunk, noise, others, closed);
}

void TensorRtCache::write(const std::string& graph, const Latents& clean, const std::vector<int64_t>& positions, int64_t past,
                          int64_t tokens) {
  const Plan& written = plan_of(plans_, graph);
  const std::vector<float> zeros(static_cast<size_t>(clean.shape[0] * clean.shape[1]));
  const size_t size = floats(clean.count());
  const Held z = lane_->uploaded(clean.data, size), still = lane_->uploaded(zeros.data(), floats(zeros.size())),
             where = lane_->uploaded(positions.data(), positions.size() * sizeof(int64_t)), z_r = lane_->take(size),
             velocity = lane_->take(size);
  const auto beside = aside(past, tokens);
  Call call = memory(past, beside);
  call.shapes["latents"] = dims(clean.shape), call.shapes["t"] = call.shapes["r"] = frames(clean.shape);
  call.shapes["positions"] = {static_cast<int64_t>(positions.size())};
  call.addresses["latents"] = z->at(), call.addresses["t"] = call.addresses["r"] = still->at(),
  call.addresses["positions"] = where->at();
  call.addresses["z_r"] = z_r->at(), call.addresses["velocity"] = velocity->at();
  lane_->run(written, taken_by(written, std::move(call)));
  for (const auto& [name, buffer] : beside) lane_->queue().copy(buffers_.at(name)->at(bytes(past)), buffer->at(), bytes(tokens));
  lane_->queue().wait();
  std::vector<Held> all = {z, still, where, z_r, velocity};
  for (const auto& [name, buffer] : beside) all.push_back(buffer);
  lane_->give(all);
}

void TensorRtCache::move(int64_t to, int64_t start, int64_t tokens) {
  for (const auto& [name, buffer] : buffers_) lane_->queue().copy(buffer->at(bytes(to)), buffer->at(bytes(start)), bytes(tokens));
}

Call TensorRtCache::memory(int64_t past, const std::map<std::string, Held>& beside) const {
  Call call;
  for (const auto& [name, buffer] : buffers_) {
    call.shapes[past_prefix + name] = {1, past, heads_, channels_}, call.addresses[past_prefix + name] = buffer->at();
    call.addresses[name] = beside.empty() ? buffer->at(bytes(past)) : beside.at(name)->at();
  }
  for (const auto& [name, buffer] : words_) {
    call.shapes[text_prefix + name] = {1, text_tokens_, heads_, channels_}, call.addresses[text_prefix + name] = buffer->at();
  }
  return call;
}

// Buffers for a chunk's keys and values where the place behind the past is not aligned (no released model).
std::map<std::string, Held> TensorRtCache::aside(int64_t past, int64_t tokens) {
  std::map<std::string, Held> beside;
  if (bytes(past) % alignment == 0) return beside;
  for (const auto& [name, buffer] : buffers_) beside[name] = lane_->take(bytes(tokens));
  return beside;
}

}  // namespace af::trt
