// A built plan, opened, and held against the manifest; see engines/tensorrt_plan.py. Never run yet (docs/cpp.md).
#pragma once

#include <NvInferRuntime.h>

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "error.hpp"

namespace af::trt {

using Dims = std::vector<int64_t>;
using Shapes = std::map<std::string, Dims>;

// TensorRT's logger: errors are kept, everything goes to the caller's log.
class Messages final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, nvinfer1::AsciiChar const* text) noexcept override;
  std::string summary() const;

 private:
  mutable std::mutex mutex_;
  std::deque<std::string> errors_;
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
    size_t profiles = 0;  // that engine.json lists
  };

  Plan(const fs::path& path, std::string name, const Graph& graph, const Opening& opening);

  // The first profile that holds a call. Throws Error where none does; the nearest is named.
  int32_t chosen(const Shapes& call) const;
  Error refused(const std::string& what) const;

  const std::string name;
  const Graph graph;
  nvinfer1::ICudaEngine& engine() const { return *engine_; }

 private:
  void check_tensors(const fs::path& path) const;
  void read_profiles();

  Messages messages_;  // outlives what logs to it
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<Profile> profiles_;
};

// "10.3.0", of the library that is loaded.
std::string version();

}  // namespace af::trt
