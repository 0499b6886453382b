#include "toy_backend.hpp"

#include <cmath>
#include <stdexcept>

namespace toy {
namespace {

int64_t wrapped(int64_t value, int64_t by) { return (value % by + by) % by; }

void spend() {
  State& s = state();
  if (!s.costs.empty()) s.now += s.costs[s.transitions % s.costs.size()];
  ++s.transitions;
}

std::string numbers(std::initializer_list<int64_t> values) {
  std::string text;
  for (const int64_t value : values) text += " " + std::to_string(value);
  return text;
}

class Run final : public af::Run {
 public:
  Run(const af::Latents& latents, float bias)
      : af::Run(latents.shape), bias_(bias), z_(latents.data, latents.data + latents.count()) {}
  void read(float* into) override { std::copy(z_.begin(), z_.end(), into); }

 protected:
  void do_step(const std::vector<float>& t, const std::vector<float>& r) override {
    spend();
    const size_t frame = z_.size() / t.size();
    for (size_t i = 0; i < z_.size(); ++i)
      z_[i] = z_[i] - (t[i / frame] - r[i / frame]) / 1000.0F * at(i, t[i / frame], r[i / frame]);
  }
  void do_velocity(const std::vector<float>& t, const std::vector<float>& r, float* into) override {
    spend();
    const size_t frame = z_.size() / t.size();
    // The draft of a deadline takes noise minus this for clean, so it is scaled like a step of 1000.
    for (size_t i = 0; i < z_.size(); ++i) into[i] = at(i, t[i / frame], r[i / frame]);
  }

 private:
  float at(size_t i, float t, float r) const { return z_[i] * 0.5F + t * 0.0009765625F + r * 0.000244140625F + bias_; }

  float bias_;
  std::vector<float> z_;
};

class Cache final : public af::Cache {
 public:
  Cache(float text, const af::CachePlan& plan) : text_(text), tokens_(static_cast<size_t>(plan.capacity())) {}

  std::unique_ptr<af::Run> run(const af::Latents& noise, const std::vector<int64_t>& positions, int64_t past) override {
    state().calls.push_back("run" + numbers({positions.front(), static_cast<int64_t>(positions.size()), past}));
    int64_t sum = 0;
    for (int64_t i = 0; i < past; ++i) sum = wrapped(sum + tokens_.at(static_cast<size_t>(i)) * (i + 1), 65536);
    return std::make_unique<Run>(noise, static_cast<float>(sum) / 65536.0F + text_);
  }

  void write(const std::string& graph, const af::Latents& clean, const std::vector<int64_t>& positions, int64_t past,
             int64_t tokens) override {
    state().calls.push_back("write " + graph +
                            numbers({positions.front(), static_cast<int64_t>(positions.size()), past, tokens}));
    const auto content = static_cast<int64_t>(std::floor(clean.data[0] * 64.0F));
    for (int64_t i = 0; i < tokens; ++i) {
      tokens_.at(static_cast<size_t>(past + i)) =
          wrapped(positions.front() * 31 + (graph == "compress" ? 17 : 0) + past * 7 + i + content, 1000);
    }
  }

  void move(int64_t to, int64_t start, int64_t tokens) override {
    state().calls.push_back("move" + numbers({to, start, tokens}));
    for (int64_t i = 0; i < tokens; ++i) tokens_.at(static_cast<size_t>(to + i)) = tokens_.at(static_cast<size_t>(start + i));
  }

 private:
  float text_;
  std::vector<int64_t> tokens_;
};

class Engine final : public af::Engine {
 public:
  using af::Engine::Engine;
  const std::string& description() const override { return description_; }
  const af::Ranges& ranges() const override { return bundle().manifest.ranges; }

 protected:
  std::unique_ptr<af::Run> do_start(const af::Latents& latents, const af::Text& text) override {
    return std::make_unique<Run>(latents, text.data[0]);
  }
  std::unique_ptr<af::Cache> do_open_cache(const af::Text& text, const af::CachePlan& plan) override {
    return std::make_unique<Cache>(text.data[0], plan);
  }

 private:
  std::string description_ = "toy";
};

}  // namespace

State& state() {
  static State only;
  return only;
}

extern "C" void toy_backend_install(void) {
  af::backends().push_back(
      {"toy", "cpu", [](std::shared_ptr<const af::Bundle> bundle, const af::EngineOptions&) -> std::shared_ptr<af::Engine> {
         return std::make_shared<Engine>(std::move(bundle));
       }});
}

}  // namespace toy
