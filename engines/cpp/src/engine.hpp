// What a backend is: an Engine that opens runs and caches. A run owns its state where the backend wants it, and copies it back
// only when asked. The checks that all backends share are done once, in the public methods; see engines/engine.py.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "cache_plan.hpp"

namespace af {

size_t elements(const LatentShape& shape);

// Latents or text of a caller's: finite float32.
struct Latents {
  const float* data;
  LatentShape shape;
  size_t count() const { return elements(shape); }
};

struct Text {
  const float* data;
  TextShape shape;
  size_t count() const { return static_cast<size_t>(shape[0] * shape[1] * shape[2]); }
};

// One sample on its way from noise to clean. For one thread at a time.
class Run {
 public:
  explicit Run(const LatentShape& shape) : shape_(shape) {}
  virtual ~Run() = default;
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  const LatentShape& shape() const { return shape_; }
  // t, r: one number for all frames, or one for each of (batch, frames).
  void step(std::span<const float> t, std::span<const float> r);
  void velocity(std::span<const float> t, std::span<const float> r, float* into);
  virtual void read(float* into) = 0;

 protected:
  // t and r with a number for each frame, checked.
  virtual void do_step(const std::vector<float>& t, const std::vector<float>& r) = 0;
  virtual void do_velocity(const std::vector<float>& t, const std::vector<float>& r, float* into) = 0;

 private:
  LatentShape shape_;
};

// A backend's buffers of one stream, counted in tokens from the start, and its graphs on them; see engines/streaming.py.
class Cache {
 public:
  Cache() = default;
  virtual ~Cache() = default;
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  // A run of graph `chunk` that sees the first `past` tokens.
  virtual std::unique_ptr<Run> run(const Latents& noise, const std::vector<int64_t>& positions, int64_t past) = 0;
  // Run `chunk` (at t = r = 0) or `compress` on the first `past` tokens, and put its own `tokens` behind them.
  virtual void write(const std::string& graph, const Latents& clean, const std::vector<int64_t>& positions, int64_t past,
                     int64_t tokens) = 0;
  // Move tokens within every buffer; the places may overlap.
  virtual void move(int64_t to, int64_t start, int64_t tokens) = 0;
};

struct EngineOptions {
  std::string provider, engine;
  int device = 0, threads = 0;
  bool cuda_graphs = true;
  Watch watch;
};

class Engine {
 public:
  explicit Engine(std::shared_ptr<const Bundle> bundle) : bundle_(std::move(bundle)) {}
  virtual ~Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const Bundle& bundle() const { return *bundle_; }
  virtual const std::string& description() const = 0;
  // The shapes it accepts, within the bundle's.
  virtual const Ranges& ranges() const = 0;

  std::unique_ptr<Run> start(const Latents& latents, const Text& text);
  std::unique_ptr<Cache> open_cache(const Text& text, const CachePlan& plan);
  // Throws Error for text that no stream takes.
  void check_text(const Text& text) const;
  // Throws Error where some chunk of a stream would be refused; `given`: how many of the first are not made but remembered.
  virtual void check_stream(const LatentShape&, const TextShape&, const CachePlan&, int64_t /*given*/) const {}

 protected:
  virtual std::unique_ptr<Run> do_start(const Latents& latents, const Text& text) = 0;
  virtual std::unique_ptr<Cache> do_open_cache(const Text& text, const CachePlan& plan) = 0;

 private:
  std::shared_ptr<const Bundle> bundle_;
};

// Throws Error: a NULL, a negative length, NaN.
void check_latents(const char* name, const Latents& latents);

struct Backend {
  const char* name;
  const char* provider;  // that it runs on when nobody says
  std::function<std::shared_ptr<Engine>(std::shared_ptr<const Bundle>, const EngineOptions&)> open;
};

// Backends of this library, the preferred first. A test adds its own.
std::vector<Backend>& backends();
// `backend` "": the first for which the bundle has an engine.
std::shared_ptr<Engine> open_engine(std::shared_ptr<const Bundle> bundle, const std::string& backend, EngineOptions options);

}  // namespace af
