// A run and a causal cache in TensorRT, on the device; see engines/tensorrt/run.py and engines/tensorrt/kv_cache.py. Not run on
// a GPU yet (docs/how-to/cpp.md).
#pragma once

#include <functional>
#include <map>
#include <memory>

#include "engine.hpp"
#include "tensorrt_lane.hpp"

namespace af::trt {

using Plans = std::map<std::string, std::unique_ptr<Plan>>;
// Shape and address of each input, and address of each output, besides state and times; asked before every step: a cache can
// move.
using Others = std::function<Call()>;

// One sample, in two buffers that are exchanged after a step.
class TensorRtRun final : public Run {
 public:
  // `closed` is called when the run ends.
  TensorRtRun(std::shared_ptr<Lane> lane, const Plan& plan, const Latents& latents, Others others, std::function<void()> closed);
  ~TensorRtRun() override;
  void read(float* into) override { download(*state_, into); }

 protected:
  void do_step(const std::vector<float>& t, const std::vector<float>& r) override;
  void do_velocity(const std::vector<float>& t, const std::vector<float>& r, float* into) override;

 private:
  void transition(const std::vector<float>& t, const std::vector<float>& r);
  void download(const Buffer& buffer, float* into);

  std::shared_ptr<Lane> lane_;
  const Plan& plan_;
  Others others_;
  std::function<void()> closed_;
  Held state_, next_, velocity_, t_, r_;
  std::vector<Held> held_;  // all of them, as they were taken
};

class TensorRtCache final : public Cache {
 public:
  // `closed` is called when the cache ends.
  TensorRtCache(std::shared_ptr<Lane> lane, const Plans& plans, const Text& text, const CachePlan& plan,
                std::function<void()> closed);

  std::unique_ptr<Run> run(const Latents& noise, const std::vector<int64_t>& positions, int64_t past) override;
  void write(const std::string& graph, const Latents& clean, const std::vector<int64_t>& positions, int64_t past,
             int64_t tokens) override;
  void move(int64_t to, int64_t start, int64_t tokens) override;
  ~TensorRtCache() override;

 private:
  // What the graphs read of the text and the past, and where a chunk's own keys and values are written.
  Call memory(int64_t past, const std::map<std::string, Held>& aside) const;
  std::map<std::string, Held> aside(int64_t past, int64_t tokens);
  size_t bytes(int64_t tokens) const { return static_cast<size_t>(tokens) * token_; }

  std::shared_ptr<Lane> lane_;
  const Plans& plans_;
  std::function<void()> closed_;
  int64_t heads_, channels_, text_tokens_, full_tokens_;
  size_t token_ = 0;  // bytes of one token's keys
  std::map<std::string, Held> buffers_, words_;
  std::vector<Held> held_;  // all of them, as they were taken
};

// The plan of a graph. Throws Error where it was not built.
const Plan& plan_of(const Plans& plans, const std::string& graph);
// Throws Error where a plan is missing, or has no profile for what a stream will ask of it.
void check_stream(const Plans& plans, const LatentShape& shape, const TextShape& text, const CachePlan& plan, int64_t given);
// A plan's call with only what it takes. Throws where something it takes is missing.
Call taken_by(const Plan& plan, Call call);

}  // namespace af::trt
