#include "tensorrt_lane.hpp"

#include <algorithm>

namespace af::trt {
namespace {

// As in engines/tensorrt/execution.py.
constexpr int general_runs = 2;
constexpr size_t kept_graphs = 16;

nvinfer1::Dims dims_of(const Dims& shape) {
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

}  // namespace

Lane::Lane(const Gpu& gpu, bool graphs) : gpu_(gpu), graphs_(graphs) {
  gpu_.use();
  queue_ = std::make_unique<Queue>();
  activations_ = std::make_unique<Buffer>(0);
}

Lane::~Lane() {
  queue_->settle();  // nothing may be freed before
}

void Lane::run(const Plan& plan, const Call& call) {
  gpu_.use();
  const int32_t profile = plan.chosen(call.shapes);
  Runner& runner = runners_[&plan];
  std::list<Known> mine;  // held apart until it is done: room for activations may drop everything that is known
  const auto found =
      std::find_if(runner.known.begin(), runner.known.end(), [&](const Known& known) { return known.call == call; });
  if (found == runner.known.end()) {
    mine.push_back({call, 0, nullptr, nullptr});
  } else {
    mine.splice(mine.begin(), runner.known, found);
  }
  try {
    again(plan, runner, mine.front(), profile);
  } catch (...) {
    queue_->settle();  // what was put on the stream before may use memory that goes with the error
    throw;
  }
  runner.known.splice(runner.known.begin(), mine);
  while (runner.known.size() > kept_graphs) {
    if (runner.known.back().own) queue_->wait();
    runner.known.pop_back();
  }
}

void Lane::again(const Plan& plan, Runner& runner, Known& known, int32_t profile) {
  ++known.runs;
  if (known.graph) {
    known.graph->launch(queue_->stream());
  } else if (!graphs_ || known.runs <= general_runs) {
    general(plan, runner, known.call, profile);
  } else if (!known.own) {
    known.own = bound(plan);
    enqueue(plan, *known.own, known.call, profile);
  } else if (capture(plan, known, profile)) {
    known.graph->launch(queue_->stream());
  } else {
    known.own.reset();
    general(plan, runner, known.call, profile);
  }
}

void Lane::general(const Plan& plan, Runner& runner, const Call& call, int32_t profile) {
  if (!runner.general) runner.general = bound(plan);
  enqueue(plan, *runner.general, call, profile);
}

bool Lane::capture(const Plan& plan, Known& known, int32_t profile) {
  try {
    known.graph = queue_->captured([&] { enqueue(plan, *known.own, known.call, profile); });
    return true;
  } catch (const Error& error) {
    log(ANYFLOW_LOG_WARNING, plan.name + " runs without CUDA graphs: " + error.what());
    graphs_ = false;
    return false;
  }
}

std::unique_ptr<Lane::Bound> Lane::bound(const Plan& plan) const {
  auto made = std::make_unique<Bound>();
  made->context = plan.context();
  return made;
}

// Set what differs from the last call, and run.
void Lane::enqueue(const Plan& plan, Bound& bound, const Call& call, int32_t profile) {
  bool changed = profile != bound.profile;
  if (changed) {
    if (!bound.context->setOptimizationProfileAsync(profile, queue_->stream()))
      throw plan.refused("change to profile " + std::to_string(profile));
    bound.profile = profile, bound.shapes.clear();
  }
  for (const auto& [name, shape] : call.shapes) {
    if (bound.shapes.contains(name) && bound.shapes[name] == shape) continue;
    if (!bound.context->setInputShape(name.c_str(), dims_of(shape))) throw plan.refused("take " + name + " of this shape");
    bound.shapes[name] = shape, changed = true;
  }
  for (const auto& [name, address] : call.addresses) {
    if (bound.addresses.contains(name) && bound.addresses[name] == address) continue;
    if (!bound.context->setTensorAddress(name.c_str(), address)) throw plan.refused("take an address for " + name);
    bound.addresses[name] = address;
  }
  if (changed) bound.needed = bound.context->updateDeviceMemorySizeForShapes();
  const Buffer& memory = activations(bound.needed);
  const std::pair<const void*, size_t> given{memory.at(), memory.size()};
  if (changed || bound.memory != given) {
    bound.context->setDeviceMemoryV2(memory.at(), static_cast<int64_t>(memory.size()));
    bound.memory = given;
  }
  if (!bound.context->enqueueV3(queue_->stream())) throw plan.refused("run");
}

// One piece for all contexts of the lane, which take turns. A larger one is another piece, and what was captured is dropped.
Buffer& Lane::activations(size_t size) {
  if (size > activations_->size()) {
    queue_->wait();
    forget();
    activations_ = std::make_unique<Buffer>(0);  // first, to make room: and if there is none all the same, this is what is left
    activations_ = std::make_unique<Buffer>(size);
  }
  return *activations_;
}

void Lane::forget() {
  for (auto& [plan, runner] : runners_) runner.known.clear();
}

Held Lane::take(size_t size) {
  auto& free = free_[size];
  if (free.empty()) {
    gpu_.use();
    return std::make_shared<Buffer>(size);
  }
  Held buffer = std::move(free.back());
  free.pop_back();
  return buffer;
}

void Lane::give(const std::vector<Held>& buffers) {
  for (auto buffer = buffers.rbegin(); buffer != buffers.rend(); ++buffer) free_[(*buffer)->size()].push_back(*buffer);
}

Held Lane::uploaded(const void* data, size_t size) {
  Held buffer = take(size);
  queue_->upload(buffer->at(), data, size);
  queue_->wait();
  return buffer;
}

}  // namespace af::trt
