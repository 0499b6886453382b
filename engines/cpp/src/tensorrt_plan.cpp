#include "tensorrt_plan.hpp"

#include <algorithm>
#include <cmath>
#include <deque>
#include <utility>

#include "mapped.hpp"

namespace af::trt {
namespace {

constexpr size_t kept_errors = 3;
constexpr auto user_managed = nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;
thread_local std::deque<std::string> errors;

Dims lengths(const nvinfer1::Dims& dims) { return {dims.d, dims.d + std::max(dims.nbDims, 0)}; }

nvinfer1::DataType type_of(const std::string& name) {
  if (name == "float16") return nvinfer1::DataType::kHALF;
  if (name == "bfloat16") return nvinfer1::DataType::kBF16;
  if (name == "int64") return nvinfer1::DataType::kINT64;
  return nvinfer1::DataType::kFLOAT;
}

std::string shown_shape(const Dims& shape) {
  std::string text;
  for (const int64_t axis : shape) text += (text.empty() ? "" : "x") + std::to_string(axis);
  return text;
}

// The inputs that tell a call's size; t, r and the other layers repeat them.
bool tells(const std::string& name) {
  return name == "latents" || name == "text" || name == "text_key.0" || name == "past_key.0";
}

Error foreign(const fs::path& path, const std::string& name, const std::string& what) {
  return {ANYFLOW_BACKEND,
          path.string() + " is not a plan of this bundle's " + in_quotes(name) + ": it has " + what + ". Build it again."};
}

// CUDA's words inside TensorRT's; its own CUDA may be newer than the one that we found the GPU with.
bool tells_of_driver(const std::string& reason) { return reason.find("driver version is insufficient") != std::string::npos; }

// TensorRT logs it as "Cuda Runtime (out of memory)" or "OutOfMemory", and returns nothing.
bool tells_of_memory(const std::string& reason) {
  return reason.find("out of memory") != std::string::npos || reason.find("OutOfMemory") != std::string::npos;
}

}  // namespace

Messages& Messages::all() {
  static auto* const only = new Messages;
  return *only;
}

void Messages::log(Severity severity, nvinfer1::AsciiChar const* text) noexcept {
  try {
    if (severity <= Severity::kERROR) {
      errors.emplace_back(text);
      if (errors.size() > kept_errors) errors.pop_front();
    }
    const auto level = severity <= Severity::kERROR     ? ANYFLOW_LOG_ERROR
                       : severity == Severity::kWARNING ? ANYFLOW_LOG_WARNING
                       : severity == Severity::kINFO    ? ANYFLOW_LOG_INFO
                                                        : ANYFLOW_LOG_DEBUG;
    af::log(level, std::string("TensorRT: ") + text);
  } catch (...) {  // no memory for a message
  }
}

// The first of them is often the cause, the last one only says that it failed.
std::string Messages::taken() {
  std::string text;
  for (const std::string& error : std::exchange(errors, {})) text += (text.empty() ? "" : " | ") + error;
  return text.empty() ? "it gave no reason" : text;
}

double Profile::distance(const Shapes& call) const {
  double total = 0;
  for (const auto& [name, ends] : shapes) {
    const auto found = call.find(name);
    if (found == call.end())
      throw Error(ANYFLOW_BUNDLE, "a plan takes " + in_quotes(name) + ", which this library does not know.");
    const Dims& given = found->second;
    for (size_t axis = 0; axis < given.size() && axis < ends[0].size(); ++axis) {
      const int64_t nearest = std::clamp(given[axis], ends[0][axis], ends[2][axis]);
      total += std::abs(std::log(static_cast<double>(given[axis] + 1) / static_cast<double>(nearest + 1)));
    }
  }
  return total;
}

std::string Profile::shown() const {
  std::string text;
  for (const auto& [name, ends] : shapes) {
    if (tells(name)) text += (text.empty() ? "" : ", ") + name + " " + shown_shape(ends[0]) + " to " + shown_shape(ends[2]);
  }
  return text;
}

Plan::Plan(const fs::path& path, std::string label, const Graph& model, const Opening& opening)
    : name(std::move(label)), graph(model) {
  check_library();
  errors.clear();  // of another plan's, if any
  runtime_.reset(nvinfer1::createInferRuntime(Messages::all()));
  if (!runtime_) throw Error(ANYFLOW_BACKEND, title() + " could not start its runtime: " + Messages::taken() + ".");
  runtime_->setEngineHostCodeAllowed(opening.host_code);  // it was built here, and its hash was compared
  {
    const Mapped file(path);  // not read into memory: a plan is as large as its weights
    engine_.reset(runtime_->deserializeCudaEngine(file.data(), file.size()));
  }
  if (!engine_) throw not_opened(path);
  // Before the first context: its scratch memory is part of a context's.
  if (opening.weight_streaming && !engine_->setWeightStreamingBudgetV2(engine_->getWeightStreamingAutomaticBudget()))
    throw refused("stream its weights");
  check_tensors(path);
  if (static_cast<size_t>(engine_->getNbOptimizationProfiles()) != opening.profiles) {
    throw foreign(path, name,
                  std::to_string(engine_->getNbOptimizationProfiles()) + " profiles where engine.json lists " +
                      std::to_string(opening.profiles));
  }
  read_profiles();
  configure(opening.graphs);
}

// A plan of another graph would read past the end of a buffer.
void Plan::check_tensors(const fs::path& path) const {
  const size_t known = graph.inputs.size() + graph.outputs.size();
  if (static_cast<size_t>(engine_->getNbIOTensors()) != known)
    throw foreign(path, name, std::to_string(engine_->getNbIOTensors()) + " tensors");
  for (const bool input : {true, false}) {
    for (const Tensor& tensor : input ? graph.inputs : graph.outputs) {
      const char* called = tensor.name.c_str();
      const auto mode = input ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kOUTPUT;
      const Dims shape = lengths(engine_->getTensorShape(called));
      bool same = engine_->getTensorIOMode(called) == mode && engine_->getTensorDataType(called) == type_of(tensor.type) &&
                  shape.size() == tensor.shape.size();
      for (size_t axis = 0; same && axis < shape.size(); ++axis) {
        const auto* fixed = std::get_if<int64_t>(&tensor.shape[axis]);
        same = !fixed || *fixed == shape[axis];
      }
      if (!same) throw foreign(path, name, "another tensor " + tensor.name + ", of shape " + shown_shape(shape));
      if (engine_->getTensorLocation(called) != nvinfer1::TensorLocation::kDEVICE)
        throw foreign(path, name, "tensor " + tensor.name + " in host memory");
    }
  }
}

void Plan::read_profiles() {
  using Select = nvinfer1::OptProfileSelector;
  for (int32_t number = 0; number < engine_->getNbOptimizationProfiles(); ++number) {
    Profile profile;
    for (const Tensor& tensor : graph.inputs) {
      const auto end = [&](Select which) { return lengths(engine_->getProfileShape(tensor.name.c_str(), number, which)); };
      profile.shapes[tensor.name] = {end(Select::kMIN), end(Select::kOPT), end(Select::kMAX)};
    }
    profiles_.push_back(std::move(profile));
  }
}

// TensorRT for RTX compiles kernels for new shapes in the background, and uses others until they are there. A graph that we
// captured would keep those others for good; its own capture waits for them. Only its own headers, not TensorRT 11's, have that.
void Plan::configure([[maybe_unused]] bool graphs) {
#ifdef TRT_MAJOR_RTX
  config_.reset(engine_->createRuntimeConfig());
  if (!config_) throw refused("make a runtime configuration");
  config_->setExecutionContextAllocationStrategy(user_managed);
  using Strategy = nvinfer1::CudaGraphStrategy;
  if (!config_->setCudaGraphStrategy(graphs ? Strategy::kWHOLE_GRAPH_CAPTURE : Strategy::kDISABLED))
    log(ANYFLOW_LOG_WARNING, name + " runs without CUDA graphs: " + Messages::taken());
#endif
}

int32_t Plan::chosen(const Shapes& call) const {
  const Profile* nearest = nullptr;
  for (const Profile& profile : profiles_) {
    if (profile.distance(call) == 0) return static_cast<int32_t>(&profile - profiles_.data());
    if (!nearest || profile.distance(call) < nearest->distance(call)) nearest = &profile;
  }
  std::string given;
  for (const auto& [input, shape] : call) {
    if (tells(input)) given += (given.empty() ? "" : ", ") + input + " " + shown_shape(shape);
  }
  throw Error(ANYFLOW_SHAPE, "no profile of this engine's " + in_quotes(name) + " holds " + given +
                                 " (latent units); the nearest is " + (nearest ? nearest->shown() : "none") +
                                 ". Build an engine with --shapes HEIGHTxWIDTHxFRAMES for this size, or change the input.");
}

Error Plan::refused(const std::string& what) const {
  const std::string reason = Messages::taken();
  return {tells_of_memory(reason) ? ANYFLOW_OUT_OF_MEMORY : ANYFLOW_BACKEND,
          title() + ": " + in_quotes(name) + " could not " + what + ": " + reason + "."};
}

Error Plan::not_opened(const fs::path& path) const {
  const std::string reason = Messages::taken();
  if (tells_of_memory(reason)) {
    return {ANYFLOW_OUT_OF_MEMORY, path.string() + " does not fit into the GPU's memory: " + reason +
                                       ". Close what else uses the GPU, or build with --weight-streaming or in 8 bits."};
  }
  const std::string what = title() + " cannot open " + path.string() + ": ";
  if (tells_of_driver(reason)) {
    return {ANYFLOW_BACKEND, what + "the NVIDIA driver of this machine is missing or too old for it (" + reason +
                                 "). Install or update the driver; nvidia-smi shows which one there is."};
  }
  return {ANYFLOW_BACKEND,
          what + reason + ". Build it on this machine: anyflow-build … --backend " + library.backend + " --overwrite"};
}

std::unique_ptr<nvinfer1::IExecutionContext> Plan::context() const {
  const std::lock_guard lock(making_);
#ifdef TRT_MAJOR_RTX
  std::unique_ptr<nvinfer1::IExecutionContext> made(engine_->createExecutionContext(config_.get()));
#else
  std::unique_ptr<nvinfer1::IExecutionContext> made(engine_->createExecutionContext(user_managed));
#endif
  if (!made) throw refused("make an execution context");
  return made;
}

}  // namespace af::trt
