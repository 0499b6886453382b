// Running a plan: execution contexts, and CUDA graphs of what is run again and again; see engines/tensorrt/execution.py, whose
// rules these are. A call that comes for the third time with the same shapes and addresses gets a context of its own, the fourth
// time it is captured, and that context is never touched again. Not run on a GPU yet (docs/how-to/cpp.md).
#pragma once

#include <list>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "tensorrt_device.hpp"
#include "tensorrt_plan.hpp"

namespace af::trt {

using Addresses = std::map<std::string, void*>;

// What is run: the shape of every input and the device address of every tensor.
struct Call {
  Shapes shapes;
  Addresses addresses;
  bool operator==(const Call&) const = default;
};

// A CUDA stream with the buffers and contexts that take turns on it. For one thread at a time.
class Lane {
 public:
  Lane(const Gpu& gpu, bool graphs);
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  Queue& queue() { return *queue_; }
  // Put one run of a plan on the stream.
  void run(const Plan& plan, const Call& call);
  // A buffer; one that was given back, if it is of this size. What was taken and is given back in the same order is taken in that
  // order again: addresses come back, and with them what was captured.
  Held take(size_t size);
  void give(const std::vector<Held>& buffers);
  Held uploaded(const void* data, size_t size);

 private:
  struct Bound {  // a context, and what is set in it
    std::unique_ptr<nvinfer1::IExecutionContext> context;
    int32_t profile = -1;
    Shapes shapes;
    Addresses addresses;
    size_t needed = 0;
    std::pair<const void*, size_t> memory{};  // address and size: a larger piece may come to lie where the last one was
  };
  struct Known {  // a call that came before
    Call call;
    int runs = 0;
    std::unique_ptr<Bound> own;
    std::unique_ptr<Captured> graph;
  };
  struct Runner {  // one plan's contexts
    std::unique_ptr<Bound> general;
    std::list<Known> known;  // the one used last in front
  };

  std::unique_ptr<Bound> bound(const Plan& plan) const;
  void enqueue(const Plan& plan, Bound& bound, const Call& call, int32_t profile);
  // Run a call once more, in the way that it has earned by now.
  void again(const Plan& plan, Runner& runner, Known& known, int32_t profile);
  void general(const Plan& plan, Runner& runner, const Call& call, int32_t profile);
  bool capture(const Plan& plan, Known& known, int32_t profile);
  Buffer& activations(size_t size);
  void forget();

  const Gpu& gpu_;
  bool graphs_;
  std::unique_ptr<Queue> queue_;
  std::map<size_t, std::vector<Held>> free_;
  std::unique_ptr<Buffer> activations_;
  std::map<const Plan*, Runner> runners_;
};

}  // namespace af::trt
