// TensorRT, or TensorRT for RTX (tensorrt_library.hpp): plans built by `anyflow-build --backend tensorrt` or `tensorrt-rtx`, run
// with CUDA's runtime; see engines/tensorrt/engine.py. Run against the headers of 10.3, 10.16, 11.1 and of RTX 1.6 on a stand-in,
// not on a GPU yet (docs/how-to/cpp.md).
#include <mutex>
#include <utility>

#include "engine.hpp"
#include "tensorrt_cache.hpp"

namespace af {
namespace {

using namespace trt;

// "10.3.0" of "10.3.0.26".
std::string release(const std::string& version) {
  size_t end = 0;
  for (int dots = 0; end < version.size() && (version[end] != '.' || ++dots < 3); ++end) {
  }
  return version.substr(0, end);
}

std::array<int, 3> numbers(const std::string& version) {
  std::array<int, 3> parts{};
  std::sscanf(version.c_str(), "%d.%d.%d", &parts[0], &parts[1], &parts[2]);
  return parts;
}

// TensorRT for RTX builds for a compute capability, or for all that it knows; not for one kind of GPU.
void match_rtx_device(EngineFolder& folder, const Gpu& gpu) {
  const Device here = gpu.record();
  const int capability = 10 * gpu.capability_major() + gpu.capability_minor();
  if (capability != 80 && capability != 86 && capability != 89 && capability < 120) {
    throw Error(ANYFLOW_BACKEND, here.name + " has compute capability " + here.compute_capability + "; " + library.title +
                                     " opens engines on 8.0, 8.6, 8.9, 12.0 and later. For this GPU build with "
                                     "--backend tensorrt, and this library with -DANYFLOW_TENSORRT=ON.");
  }
  const std::string& built = folder.device.compute_capability;
  if (built.empty() || built == here.compute_capability) folder.device = here;
}

void match_device(EngineFolder& folder, const Gpu& gpu) {
  const Device here = gpu.record();
  const auto wanted = folder.texts.find("hardware_compatible");
  if (wanted != folder.texts.end() &&
      ((wanted->second == "ampere+" && gpu.capability_major() >= 8) ||
       (wanted->second == "same-capability" && folder.device.compute_capability == here.compute_capability))) {
    folder.device = here;
  }
}

// Refuse an engine of another GPU or TensorRT, unless it was built to be compatible.
void check_compatible(EngineFolder folder, const Gpu& gpu) {
  (library.rtx ? match_rtx_device : match_device)(folder, gpu);
  if (const auto found = folder.versions.find(library.version_key); found != folder.versions.end()) {
    std::string& built = found->second;
    built = release(built);
    const bool later = numbers(version())[0] == numbers(built)[0] && numbers(version()) >= numbers(built);
    if (folder.flag("version_compatible") && later) built = version();
  }
  check_here(folder, gpu.record(), {{library.version_key, version()}});
}

class TensorRtEngine final : public Engine {
 public:
  TensorRtEngine(std::shared_ptr<const Bundle> opened, const EngineOptions& options)
      : Engine(std::move(opened)), gpu_(options.device) {
    const EngineFolder folder = find_engine(bundle(), library.backend, options.engine, options.watch);
    check_compatible(folder, gpu_);
    if (folder.flag("strip")) {
      throw Error(ANYFLOW_BACKEND,
                  folder.path.string() +
                      " has no weights in its plans (--strip), and this library cannot refit them. Build it without --strip.");
    }
    const bool streaming = folder.flag("weight_streaming");
    const bool graphs = options.cuda_graphs && !streaming;  // a run that waits for weights cannot be captured
    graphs_ = graphs && !library.rtx;
    for (const auto& [name, profiles] : folder.profiles) {
      const auto graph = bundle().manifest.graphs.find(name);
      if (graph == bundle().manifest.graphs.end())
        throw Error(ANYFLOW_BUNDLE,
                    folder.path.string() + " has a plan of " + in_quotes(name) + ", which the bundle lacks. Build it again.");
      plans_[name] = std::make_unique<Plan>(folder.file(name + ".plan"), name, graph->second,
                                            Plan::Opening{folder.flag("version_compatible"), streaming, graphs, profiles});
    }
    const char* needed = bundle().manifest.causal() ? "chunk" : "transition";
    if (!plans_.contains(needed)) {
      throw Error(ANYFLOW_BUNDLE, folder.path.string() + " was built without " + in_quotes(needed) + ". Build it again.");
    }
    ranges_ = folder.ranges;
    description_ = title() + ", " + gpu_.name() + ", " + bundle().manifest.precision;
  }

  const std::string& description() const override { return description_; }
  const Ranges& ranges() const override { return ranges_; }
  void check_stream(const LatentShape& shape, const TextShape& text, const CachePlan& plan, int64_t given) const override {
    trt::check_stream(plans_, shape, text, plan, given);
  }

 protected:
  std::unique_ptr<Run> do_start(const Latents& latents, const Text& text) override {
    const Plan& plan = *plans_.at("transition");
    const Dims z(latents.shape.begin(), latents.shape.end()), words(text.shape.begin(), text.shape.end()), times = {z[0], z[1]};
    plan.chosen({{"latents", z}, {"text", words}, {"t", times}, {"r", times}});  // before anything is reserved
    Dims key = z;
    key.insert(key.end(), words.begin(), words.end());
    auto lane = taken_lane(key);
    const Held held = lane->uploaded(text.data, text.count() * sizeof(float));
    const Others others = [words, held] { return Call{{{"text", words}}, {{"text", held->at()}}}; };
    const auto closed = [this, key, lane, held] {
      lane->give({held});
      leave(key, lane);
    };
    return std::make_unique<TensorRtRun>(std::move(lane), plan, latents, others, closed);
  }

  std::unique_ptr<Cache> do_open_cache(const Text& text, const CachePlan& plan) override {
    Dims key = {text.shape[1], plan.window.value_or(0), plan.full_tokens, plan.compressed_tokens};
    key.insert(key.end(), plan.chunks.begin(), plan.chunks.end());
    const auto lane = taken_lane(key);
    return std::make_unique<TensorRtCache>(lane, plans_, text, plan, [this, key, lane] { leave(key, lane); });
  }

 private:
  using Key = Dims;  // all that a lane's buffers depend on

  // The idle lane if it is of the same shapes, else a new one in its place: its buffers, contexts and captured graphs come back.
  std::shared_ptr<Lane> taken_lane(const Key& key) {
    std::shared_ptr<Lane> idle;
    {
      const std::lock_guard lock(mutex_);
      idle = std::exchange(idle_.second, nullptr);
      if (idle && idle_.first == key) return idle;
    }
    idle.reset();  // its memory may be needed
    return std::make_shared<Lane>(gpu_, graphs_);
  }

  void leave(const Key& key, std::shared_ptr<Lane> lane) {
    std::pair<Key, std::shared_ptr<Lane>> other{key, std::move(lane)};
    const std::lock_guard lock(mutex_);
    std::swap(idle_, other);  // `other` goes when the lock is open again: giving memory back takes its time
  }

  Gpu gpu_;
  bool graphs_ = true;
  Plans plans_;
  Ranges ranges_;
  std::string description_;
  std::mutex mutex_;
  std::pair<Key, std::shared_ptr<Lane>> idle_;  // goes before the plans
};

}  // namespace

std::shared_ptr<Engine> open_tensorrt(std::shared_ptr<const Bundle> bundle, const EngineOptions& options) {
  if (options.provider != "cuda") {
    throw Error(ANYFLOW_BACKEND, std::string(library.title) + " runs on NVIDIA GPUs only; provider is " +
                                     in_quotes(options.provider) + ". Choose provider 'cuda'.");
  }
  return std::make_shared<TensorRtEngine>(std::move(bundle), options);
}

}  // namespace af
