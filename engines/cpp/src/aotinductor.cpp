// AOTInductor on the CPU: the packages that `anyflow-build --backend aotinductor` makes, opened by torch's own loader, with the
// bundle's weights lent to them; see engines/aotinductor/engine.py. The only file that includes torch.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/headeronly/version.h>

#include <cstring>
#include <mutex>
#include <set>

#include "engine.hpp"
#include "error.hpp"
#include "processor.hpp"
#include "safetensors.hpp"

namespace af {
namespace {

using Tensors = std::map<std::string, at::Tensor>;

at::ScalarType type_of(const std::string& name) {
  static const std::map<std::string, at::ScalarType> types = {{"F32", at::kFloat},         {"F16", at::kHalf},
                                                              {"BF16", at::kBFloat16},     {"F64", at::kDouble},
                                                              {"I64", at::kLong},          {"I32", at::kInt},
                                                              {"I8", at::kChar},           {"U8", at::kByte},
                                                              {"BOOL", at::kBool},         {"F8_E4M3", at::kFloat8_e4m3fn},
                                                              {"float32", at::kFloat},     {"float16", at::kHalf},
                                                              {"bfloat16", at::kBFloat16}, {"int64", at::kLong}};
  const auto found = types.find(name);
  if (found == types.end()) throw Error(ANYFLOW_BACKEND, "AOTInductor: no weights of type " + name + " are known. Export again.");
  return found->second;
}

at::Tensor copied(const void* data, at::IntArrayRef shape, at::ScalarType type) {
  at::Tensor tensor = at::empty(shape, type);
  if (tensor.numel()) std::memcpy(tensor.mutable_data_ptr(), data, tensor.nbytes());
  return tensor;
}

void copy_out(const at::Tensor& tensor, float* into) {
  const at::Tensor whole = tensor.to(at::kFloat).contiguous();
  std::memcpy(into, whole.const_data_ptr(), whole.nbytes());
}

// The tensor of a name that the manifest gives a graph, or that this file gives a meaning.
const at::Tensor& named(const Tensors& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  if (found == tensors.end())
    throw Error(ANYFLOW_BUNDLE,
                "the bundle's graphs and this library do not agree on a tensor " + in_quotes(name) + ". Update the library.");
  return found->second;
}

std::string first_line(const c10::Error& error) {
  const std::string text = error.what_without_backtrace();
  return text.substr(0, text.find('\n'));
}

// The weights, one copy for all packages. AOTInductor's runtime never lets go of what it was lent, so the storages are emptied.
class Weights {
 public:
  Weights(const Bundle& bundle, const std::set<std::string>& names) {
    Safetensors file(bundle.file(Bundle::weights));
    for (const std::string& name : names) {
      const Stored* stored = file.find(name);
      if (!stored) {
        throw Error(ANYFLOW_BACKEND, bundle.path.string() + " has no weight " + in_quotes(name) +
                                         ", which the engine wants. Build it again with anyflow-build.");
      }
      at::Tensor& tensor = tensors_[name] = at::empty(stored->shape, type_of(stored->type));
      file.read(*stored, tensor.mutable_data_ptr());
    }
  }
  ~Weights() {
    for (auto& [name, tensor] : tensors_) tensor.storage().unsafeGetStorageImpl()->reset();
  }
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;

  std::unordered_map<std::string, at::Tensor> some(const std::vector<std::string>& names) const {
    std::unordered_map<std::string, at::Tensor> found;
    for (const std::string& name : names) found[name] = tensors_.at(name);
    return found;
  }

 private:
  std::map<std::string, at::Tensor> tensors_;
};

// One package. Calls from several threads wait for each other: a package has one set of buffers.
class Package {
 public:
  Package(const fs::path& path, const Graph& graph) : graph_(graph) {
    try {
      loader_ = std::make_unique<torch::inductor::AOTIModelPackageLoader>(path.string(), "model", true, 1, -1);
    } catch (const c10::Error& error) {
      throw Error(ANYFLOW_BACKEND,
                  path.string() + " cannot be opened by torch " TORCH_VERSION ": " + first_line(error) + " Build it again.");
    }
    weights_ = loader_->get_constant_fqns();
  }

  const std::vector<std::string>& weights() const { return weights_; }
  const Graph& graph() const { return graph_; }

  void take(const Weights& weights) {
    auto lent = weights.some(weights_);
    loader_->load_constants(lent, false, true, true);
  }

  // Tensors by name; those that the graph does not take are left out.
  Tensors operator()(const Tensors& inputs) {
    std::vector<at::Tensor> taken;
    for (const Tensor& tensor : graph_.inputs) taken.push_back(named(inputs, tensor.name));
    const c10::InferenceMode no_gradients;
    const std::lock_guard lock(mutex_);
    try {
      const std::vector<at::Tensor> made = loader_->boxed_run(std::move(taken));
      if (made.size() != graph_.outputs.size())
        throw Error(ANYFLOW_BUNDLE, "a package has other outputs than the manifest lists. Build the engine again.");
      Tensors outputs;
      for (size_t i = 0; i < graph_.outputs.size(); ++i) outputs[graph_.outputs[i].name] = made[i];
      return outputs;
    } catch (const c10::OutOfMemoryError& error) {
      throw Error(ANYFLOW_OUT_OF_MEMORY, "a transition does not fit in memory: " + first_line(error) + " Make a smaller video.");
    } catch (const c10::Error& error) {
      throw Error(ANYFLOW_BACKEND, "torch " TORCH_VERSION " could not run a transition: " + first_line(error));
    }
  }

 private:
  Graph graph_;
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader_;
  std::vector<std::string> weights_;
  std::mutex mutex_;
};

using Packages = std::map<std::string, std::unique_ptr<Package>>;

class AotInductorRun final : public Run {
 public:
  AotInductorRun(Package& package, const Latents& latents, Tensors others)
      : Run(latents.shape),
        package_(package),
        others_(std::move(others)),
        state_(copied(latents.data, latents.shape, at::kFloat)) {}

  void read(float* into) override { copy_out(state_, into); }

 protected:
  void do_step(const std::vector<float>& t, const std::vector<float>& r) override { state_ = named(made(t, r), "z_r"); }
  void do_velocity(const std::vector<float>& t, const std::vector<float>& r, float* into) override {
    copy_out(named(made(t, r), "velocity"), into);
  }

 private:
  Tensors made(const std::vector<float>& t, const std::vector<float>& r) {
    const std::array<int64_t, 2> frames = {shape()[0], shape()[1]};
    Tensors inputs = others_;
    inputs["latents"] = state_, inputs["t"] = copied(t.data(), frames, at::kFloat),
    inputs["r"] = copied(r.data(), frames, at::kFloat);
    return package_(inputs);
  }

  Package& package_;
  Tensors others_;
  at::Tensor state_;
};

// One buffer per cached tensor, made once: graphs read the piece from the start without a copy, and a finished chunk's own keys
// and values are written right behind it. Their names are the chunk's outputs that come back as its past.
class AotInductorCache final : public Cache {
 public:
  AotInductorCache(Packages& packages, const Text& text, const CachePlan& plan)
      : packages_(packages), heads_(plan.heads), channels_(plan.channels) {
    words_ = graph("text")({{"text", copied(text.data, text.shape, at::kFloat)}});
    const Graph& chunk = graph("chunk").graph();
    std::set<std::string> inputs;
    for (const Tensor& tensor : chunk.inputs) inputs.insert(tensor.name);
    for (const Tensor& tensor : chunk.outputs) {
      if (inputs.contains(past_ + tensor.name))
        buffers_[tensor.name] = at::zeros({1, plan.capacity(), heads_, channels_}, type_of(tensor.type));
    }
  }

  std::unique_ptr<Run> run(const Latents& noise, const std::vector<int64_t>& positions, int64_t past) override {
    return std::make_unique<AotInductorRun>(graph("chunk"), noise, memory(positions, past));
  }

  void write(const std::string& name, const Latents& clean, const std::vector<int64_t>& positions, int64_t past,
             int64_t tokens) override {
    Tensors inputs = memory(positions, past);
    inputs["latents"] = copied(clean.data, clean.shape, at::kFloat);
    inputs["t"] = inputs["r"] = at::zeros({clean.shape[0], clean.shape[1]});
    const Tensors made = graph(name)(inputs);
    const c10::InferenceMode no_gradients;
    for (auto& [key, buffer] : buffers_) buffer.narrow(1, past, tokens).copy_(named(made, key));
  }

  void move(int64_t to, int64_t start, int64_t tokens) override {
    const c10::InferenceMode no_gradients;
    for (auto& [key, buffer] : buffers_) buffer.narrow(1, to, tokens).copy_(buffer.narrow(1, start, tokens).clone());
  }

 private:
  Package& graph(const std::string& name) { return *packages_.at(name); }

  Tensors memory(const std::vector<int64_t>& positions, int64_t past) {
    Tensors inputs = words_;
    inputs["positions"] = copied(positions.data(), {static_cast<int64_t>(positions.size())}, at::kLong);
    for (const auto& [key, buffer] : buffers_) {
      inputs[past_ + key] = buffer.view(-1).narrow(0, 0, past * heads_ * channels_).view({1, past, heads_, channels_});
    }
    return inputs;
  }

  static inline const std::string past_ = "past_";
  Packages& packages_;
  int64_t heads_, channels_;
  Tensors words_, buffers_;
};

class AotInductorEngine final : public Engine {
 public:
  AotInductorEngine(std::shared_ptr<const Bundle> opened, const EngineOptions& options) : Engine(std::move(opened)) {
    EngineFolder folder = find_engine(bundle(), "aotinductor", options.engine, options.watch);
    auto& torch = folder.versions["torch"];
    torch = torch.substr(0, torch.find('+'));  // "2.13.0+cpu": which wheel it came from does not matter on a CPU
    check_here(folder, {"cpu", machine(), ""},
               {{"torch", TORCH_VERSION}, {"processor instructions", instructions(at::get_cpu_capability())}});
    if (options.threads) at::set_num_threads(options.threads);
    std::set<std::string> wanted;
    for (const auto& [name, graph] : bundle().manifest.graphs) {
      packages_[name] = std::make_unique<Package>(folder.file(name + ".pt2"), graph);
      wanted.insert(packages_[name]->weights().begin(), packages_[name]->weights().end());
    }
    weights_ = std::make_unique<Weights>(bundle(), wanted);
    for (const auto& [name, package] : packages_) package->take(*weights_);
    ranges_ = folder.ranges;
    description_ = "AOTInductor, torch " TORCH_VERSION ", cpu, " + bundle().manifest.precision;
  }

  const std::string& description() const override { return description_; }
  const Ranges& ranges() const override { return ranges_; }

 protected:
  std::unique_ptr<Run> do_start(const Latents& latents, const Text& text) override {
    return std::make_unique<AotInductorRun>(*packages_.at("transition"), latents,
                                            Tensors{{"text", copied(text.data, text.shape, at::kFloat)}});
  }
  std::unique_ptr<Cache> do_open_cache(const Text& text, const CachePlan& plan) override {
    return std::make_unique<AotInductorCache>(packages_, text, plan);
  }

 private:
  std::unique_ptr<Weights> weights_;  // outlives the packages
  Packages packages_;
  Ranges ranges_;
  std::string description_;
};

}  // namespace

std::shared_ptr<Engine> open_aotinductor(std::shared_ptr<const Bundle> bundle, const EngineOptions& options) {
  if (options.provider != "cpu") {
    throw Error(ANYFLOW_BACKEND, "AOTInductor runs on the CPU in this library; provider is " + in_quotes(options.provider) +
                                     ". Use provider cpu, backend tensorrt, or Python's engine.");
  }
  try {
    return std::make_shared<AotInductorEngine>(std::move(bundle), options);
  } catch (const c10::Error& error) {
    throw Error(ANYFLOW_BACKEND, "torch " TORCH_VERSION " could not open the engine: " + first_line(error));
  }
}

}  // namespace af
