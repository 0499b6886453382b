// A built plan, opened, and held against the manifest; see engines/tensorrt/plan.py. Not run on a GPU yet (docs/how-to/cpp.md).
#pragma once

#include <NvInferRuntime.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "error.hpp"
#include "tensorrt_library.hpp"

namespace af::trt {

using Dims = std::vector<int64_t>;
using Shapes = std::map<std::string, Dims>;

// TensorRT's logger: errors are kept, everything goes to the caller's log. One for the process, as TensorRT wants it, and never
// destroyed: it has to outlive every object of TensorRT's.
class Messages final : public nvinfer1::ILogger {
 public:
  static Messages& all();
  void log(Severity severity, nvinfer1::AsciiChar const* text) noexcept override;
  // The last errors that this thread was told, which are forgotten then.
  static std::string taken();
};

// Smallest, best and largest shape of every input.
struct Profile {
  std::map<std::string, std::array<Dims, 3>> shapes;
  // How far outside a call is; 0: it lies within.
  double distance(const Shapes& call) const;
  std::string shown() const;
};

class Plan {
 public:
  struct Opening {
    bool host_code = false, weight_streaming = false;
    bool graphs = false;  // TensorRT for RTX is to capture CUDA graphs itself
    size_t profiles = 0;  // that engine.json lists
  };

  Plan(const fs::path& path, std::string name, const Graph& graph, const Opening& opening);

  // The first profile that holds a call. Throws Error where none does; the nearest is named.
  int32_t chosen(const Shapes& call) const;
  Error refused(const std::string& what) const;
  // Without memory for activations. Several threads may ask; each context is for one at a time.
  std::unique_ptr<nvinfer1::IExecutionContext> context() const;

  const std::string name;
  const Graph graph;

 private:
  Error not_opened(const fs::path& path) const;
  void check_tensors(const fs::path& path) const;
  void read_profiles();
  void configure(bool graphs);

  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
#ifdef TRT_MAJOR_RTX
  std::unique_ptr<nvinfer1::IRuntimeConfig> config_;
#endif
  std::vector<Profile> profiles_;
  mutable std::mutex making_;  // of contexts: TensorRT promises only that they may run at once
};

}  // namespace af::trt
