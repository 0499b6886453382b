// TensorRT's runtime on plans of text; see machine.hpp. `v_classes.hpp` is made from the release's own NvInferImpl.h
// (tests/fakes/cpp_tensorrt.py): a class for each interface in which every function says that it is not acted.
#include <NvInferRuntime.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <set>
#include <thread>

#include "machine.hpp"
#include "plan.hpp"
#include "v_classes.hpp"

namespace standin {
namespace {

using namespace nvinfer1;
using Severity = ILogger::Severity;

#define STANDIN_LOCK() const std::lock_guard<std::recursive_mutex> lock(::standin::mutex())

std::array<int, 3> library_version() {
  std::array<int, 3> parts = {NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH};
  std::sscanf(setting("version", "").c_str(), "%d.%d.%d", &parts[0], &parts[1], &parts[2]);
  return parts;
}

std::string version_text() {
  const auto v = library_version();
  return std::to_string(v[0]) + "." + std::to_string(v[1]) + "." + std::to_string(v[2]);
}

Dims dims_of(const Shape& shape) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

// TensorRT before 8.4 kept one logger a process, and NVIDIA still advises to have one.
ILogger* the_logger = nullptr;

class Runtime final : public IRuntime, public VRuntimeBase {
 public:
  explicit Runtime(ILogger& logger) : logger_(logger) {
    mImpl = this;
    if (counters().runtimes++ > 0 && the_logger != &logger) violation("a second logger while a runtime with another one lives");
    the_logger = &logger;
  }
  ~Runtime() noexcept override {
    STANDIN_LOCK();
    if (engines) violation("a runtime was destroyed before its engines");
    --counters().runtimes;
  }
  IRuntime* getPImpl() noexcept override { return this; }
  void setEngineHostCodeAllowed(bool allowed) noexcept override { host_code_ = allowed; }
  ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override;
  void error(const std::string& text) const { logger_.log(Severity::kERROR, text.c_str()); }
  void say(Severity severity, const std::string& text) const { logger_.log(severity, text.c_str()); }

  int engines = 0;

 private:
  ILogger& logger_;
  bool host_code_ = false;
};

#ifdef TRT_MAJOR_RTX
class RuntimeConfig final : public IRuntimeConfig, public VRuntimeConfigBase {
 public:
  RuntimeConfig() {
    mImpl = this;
    ++counters().configurations;
  }
  ~RuntimeConfig() noexcept override { --counters().configurations; }
  IRuntimeConfig* getPImpl() noexcept override { return this; }
  void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept override {
    allocation = strategy;
  }
  bool setCudaGraphStrategy(CudaGraphStrategy strategy) noexcept override {
    graphs = strategy == CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE;
    return true;
  }

  ExecutionContextAllocationStrategy allocation = ExecutionContextAllocationStrategy::kSTATIC;
  bool graphs = false;
};
#endif

class Engine final : public ICudaEngine, public VCudaEngineBase {
 public:
  Engine(Runtime& from, PlanFile file, uintptr_t weights)
      : runtime(from), plan(std::move(file)), device(current_device()), weights_(weights) {
    mImpl = this;
    ++runtime.engines, ++counters().engines;
  }
  ~Engine() noexcept override {
    STANDIN_LOCK();
    if (contexts) violation("an engine was destroyed before its execution contexts");
    if (weights_) release(weights_);
    --runtime.engines, --counters().engines;
  }
  ICudaEngine* getPImpl() noexcept override { return this; }
  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept override;
#ifdef TRT_MAJOR_RTX
  IRuntimeConfig* createRuntimeConfig() noexcept override { return new RuntimeConfig; }
  IExecutionContext* createExecutionContextWithRuntimeConfig(IRuntimeConfig* config) noexcept override {
    const auto& given = *static_cast<RuntimeConfig*>(config);
    if (given.graphs) ++counters().own_graphs;
    return createExecutionContext(given.allocation);
  }
#endif

  int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(plan.tensors.size()); }
  int32_t getNbOptimizationProfiles() const noexcept override { return static_cast<int32_t>(plan.profiles.size()); }
  Dims getTensorShape(char const* name) const noexcept override {
    const PlanTensor* tensor = known(name);
    return tensor ? dims_of(tensor->shape) : Dims{-1, {}};
  }
  DataType getTensorDataType(char const* name) const noexcept override {
    const PlanTensor* tensor = known(name);
    if (!tensor || tensor->type == "float32") return DataType::kFLOAT;
    return tensor->type == "float16" ? DataType::kHALF : tensor->type == "int64" ? DataType::kINT64 : DataType::kBF16;
  }
  TensorLocation getTensorLocation(char const* name) const noexcept override {
    const PlanTensor* tensor = known(name);
    return tensor && tensor->host ? TensorLocation::kHOST : TensorLocation::kDEVICE;
  }
  TensorIOMode getTensorIOMode(char const* name) const noexcept override {
    const PlanTensor* tensor = known(name);
    return !tensor ? TensorIOMode::kNONE : tensor->input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
  }
  Dims getProfileShape(char const* name, int32_t profile, OptProfileSelector select) const noexcept override {
    if (profile < 0 || profile >= getNbOptimizationProfiles()) violation("a profile that does not exist");
    const auto& shapes = plan.profiles[static_cast<size_t>(profile)];
    const auto found = shapes.find(name);
    return found == shapes.end() ? Dims{-1, {}} : dims_of(found->second[static_cast<size_t>(select)]);
  }
  bool setWeightStreamingBudgetV2(int64_t budget) noexcept override {
    if (contexts) violation("the budget of weight streaming was changed while there are contexts");
    return plan.weight_streaming && budget >= 0;
  }
  int64_t getWeightStreamingAutomaticBudget() const noexcept override {
    if (!plan.weight_streaming) violation("weight streaming was asked about, and the plan was built without");
    return 1 << 20;
  }

  Runtime& runtime;
  const PlanFile plan;
  const int device;
  int contexts = 0;
  int64_t enqueued = 0;

 private:
  const PlanTensor* known(char const* name) const {
    const PlanTensor* tensor = plan.find(name);
    if (!tensor) runtime.error(std::string("no tensor is called ") + name);
    return tensor;
  }

  uintptr_t weights_;
  std::atomic<bool> busy_ = false;
};

class Context final : public IExecutionContext, public VExecutionContextBase {
 public:
  explicit Context(Engine& engine) : engine_(engine), mark_(std::make_shared<ContextMark>()) {
    mImpl = this;
    ++engine_.contexts, ++counters().contexts, ++counters().contexts_made;
  }
  ~Context() noexcept override {
    STANDIN_LOCK();
    if (pending(mark_.get()) && !lost()) violation("an execution context was destroyed with work pending");
    mark_->alive = false;
    --engine_.contexts, --counters().contexts;
  }
  IExecutionContext* getPImpl() noexcept override { return this; }

  bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept override {
    STANDIN_LOCK();
    touch("another profile");
    if (capturing(stream)) violation("a profile was set while the stream is captured");
    if (profile < 0 || profile >= engine_.getNbOptimizationProfiles()) return refused("there is no such profile");
    profile_ = profile, profile_stream_ = stream, sized_ = false;
    shapes_.clear();
    return true;
  }
  bool setInputShape(char const* name, Dims const& dims) noexcept override {
    STANDIN_LOCK();
    touch("another shape");
    if (profile_ < 0) violation("a shape was set before a profile");
    const auto& ranges = engine_.plan.profiles[static_cast<size_t>(profile_)];
    const auto range = ranges.find(name);
    if (range == ranges.end()) return refused(std::string("no input is called ") + name);
    const Shape shape(dims.d, dims.d + dims.nbDims);
    if (shape.size() != range->second[0].size()) return refused(std::string(name) + " has another number of dimensions");
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      if (shape[axis] < range->second[0][axis] || shape[axis] > range->second[2][axis])
        return refused(std::string(name) + " is outside the profile on axis " + std::to_string(axis));
    }
    shapes_[name] = shape, sized_ = false;
    return true;
  }
  bool setTensorAddress(char const* name, void* data) noexcept override {
    STANDIN_LOCK();
    touch("another address");
    if (!engine_.plan.find(name)) return refused(std::string("no tensor is called ") + name);
    const auto address = reinterpret_cast<uintptr_t>(data);
    if (!address || address % 256) violation(std::string(name) + " is at an address that is not a multiple of 256");
    addresses_[name] = address;
    return true;
  }
  size_t updateDeviceMemorySizeForShapes() noexcept override {
    STANDIN_LOCK();
    check_shapes();
    sized_ = true;
    return needed();
  }
  void setDeviceMemoryV2(void* memory, int64_t size) noexcept override {
    STANDIN_LOCK();
    touch("other memory");
    memory_ = {reinterpret_cast<uintptr_t>(memory), static_cast<size_t>(size), "activation memory"};
  }
  bool enqueueV3(cudaStream_t stream) noexcept override;

 private:
  void touch(const char* what) const {
    if (mark_->captured)
      violation(std::string("a context was given ") + what + " after its run was captured: undefined in TensorRT");
  }
  bool refused(const std::string& why) const {
    engine_.runtime.error("IExecutionContext: " + why);
    return false;
  }
  void check_shapes() const {
    for (const PlanTensor& tensor : engine_.plan.tensors) {
      if (tensor.input && !shapes_.contains(tensor.name)) violation("no shape was set for " + tensor.name);
    }
  }
  size_t needed() const {
    size_t total = 1000;
    for (const auto& [name, shape] : shapes_) total += 8 * elements(shape);
    return total;
  }

  Engine& engine_;
  std::shared_ptr<ContextMark> mark_;
  int32_t profile_ = -1;
  cudaStream_t profile_stream_ = nullptr;
  bool sized_ = false;
  Shapes shapes_;
  std::map<std::string, uintptr_t> addresses_;
  Range memory_{0, 0, "activation memory"};
};

bool Context::enqueueV3(cudaStream_t stream) noexcept {
  STANDIN_LOCK();
  const PlanFile& plan = engine_.plan;
  if (lost()) return refused("Cuda Runtime (an illegal memory access was encountered)");
  if (last_error() != cudaSuccess) violation("an error of an earlier call was left for TensorRT to find");
  if (current_device() != engine_.device || device_of(stream) != engine_.device)
    violation("a plan of another device than the current one, or than the stream's, was run");
  if (mark_->captured) violation("a captured context was run besides its graph");
  check_shapes();
  if (stream != profile_stream_) violation("the profile was set on another stream");
  if (!sized_) violation("the memory for these shapes was not asked for");
  if (memory_.size < needed()) violation("too little activation memory");
  if (capturing(stream) && plan.weight_streaming) return refused("a run that streams weights cannot be captured");
  if (++engine_.enqueued == plan.fails) return refused("Cuda Runtime (an illegal memory access was encountered)");
  const Shapes shapes = all_shapes(plan, shapes_);
  Work work;
  std::map<std::string, Range> ranges;
  for (const PlanTensor& tensor : plan.tensors) {
    if (!addresses_.contains(tensor.name)) violation("no address was set for " + tensor.name);
    const Range range{addresses_[tensor.name], elements(shapes.at(tensor.name)) * tensor.element(), tensor.name.c_str()};
    check_reserved(range, engine_.device);
    ranges.emplace(tensor.name, range);
    (tensor.input ? work.reads : work.writes).push_back(range);
  }
  check_reserved(memory_, engine_.device);
  work.writes.push_back(memory_);
  for (size_t i = 0; i < work.writes.size(); ++i) {
    const auto clash = [&](const Range& other) {
      if (overlap(work.writes[i], other)) violation(std::string(work.writes[i].what) + " is written over " + other.what);
    };
    for (const Range& read : work.reads) clash(read);
    for (size_t j = 0; j < i; ++j) clash(work.writes[j]);
  }
  work.context = mark_;
  // Everything is copied: what a graph does later must not depend on what the context is told then.
  work.run = [&plan, shapes, ranges, memory = memory_, device = engine_.device] {
    Bytes inputs;
    std::map<std::string, uint8_t*> outputs;
    for (const PlanTensor& tensor : plan.tensors) {
      const Range& range = ranges.at(tensor.name);
      if (tensor.input)
        inputs[tensor.name] = reading(range, device);
      else
        outputs[tensor.name] = writing(range, device);
    }
    spoil(memory, device);
    compute(plan, shapes, inputs, outputs);
  };
  mark_->captured = capturing(stream);
  put(stream, std::move(work), "enqueueV3");
  ++counters().enqueued;
  return true;
}

IExecutionContext* Engine::createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept {
  if (busy_.exchange(true)) violation("two threads make a context of one engine at once");
  std::this_thread::yield();
  busy_ = false;
  STANDIN_LOCK();
  if (strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED) violation("a context with activation memory of its own");
  if (current_device() != device) violation("a context was made while another device is current");
  if (number("contexts", 1000) <= contexts) {
    runtime.error("there is no memory for another context");
    return nullptr;
  }
  return new Context(*this);
}

ICudaEngine* Runtime::deserializeCudaEngine(void const* blob, std::size_t size) noexcept {
  STANDIN_LOCK();
  say(Severity::kINFO, "Loaded engine size: 0 MiB");
  try {
    PlanFile plan = PlanFile::parsed(std::string(static_cast<const char*>(blob), size));
    if (plan.version != version_text() && !(plan.version_compatible && host_code_))
      throw std::runtime_error("Version tag does not match: the plan is of " + plan.version);
    if (plan.capability != "any" && plan.capability != setting("capability", STANDIN_CAPABILITY))
      throw std::runtime_error("the plan was generated on a device of compute capability " + plan.capability);
    if (plan.weight_streaming) plan.weights = 0;
    const uintptr_t weights = plan.weights ? reserve(static_cast<size_t>(plan.weights)) : 0;
    if (plan.weights && !weights) {
      error("[defaultAllocator] Error Code 1: Cuda Runtime (out of memory)");
      error("[engine] Error Code 2: OutOfMemory (Requested size was " + std::to_string(plan.weights) + " bytes.)");
      return nullptr;
    }
    return new Engine(*this, std::move(plan), weights);
  } catch (const std::exception& fault) {
    error(std::string("Error Code 1: Serialization (") + fault.what() + ")");
    return nullptr;
  }
}

}  // namespace
}  // namespace standin

extern "C" {

void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
  STANDIN_LOCK();
  auto& given = *static_cast<nvinfer1::ILogger*>(logger);
  if (standin::library_version()[0] != NV_TENSORRT_MAJOR) {
    given.log(nvinfer1::ILogger::Severity::kERROR, "the program was compiled for another TensorRT");
    return nullptr;
  }
  if (version != NV_TENSORRT_VERSION) standin::violation("the backend was compiled against other headers than the stand-in");
  return static_cast<nvinfer1::IRuntime*>(new standin::Runtime(given));
}

int32_t getInferLibMajorVersion() noexcept { return standin::library_version()[0]; }
int32_t getInferLibMinorVersion() noexcept { return standin::library_version()[1]; }
int32_t getInferLibPatchVersion() noexcept { return standin::library_version()[2]; }

}  // extern "C"
