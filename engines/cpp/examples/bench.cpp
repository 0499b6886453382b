// Seconds a transition takes. The last line is JSON.
#include <chrono>

#include "arguments.hpp"

int main(int count, char** words) {
  return told([&] {
    const Arguments given(count, words,
                          "usage: bench BUNDLE [--latents F,H,W] [--rounds N] [--backend NAME] [--engine NAME] [--threads N]",
                          {"--latents", "--rounds", "--backend", "--engine", "--threads", "--seed"});
    const anyflow::Bundle bundle(given.bundle);
    const auto info = bundle.info();
    if (std::string(info.kind) == "causal")
      throw std::invalid_argument("bench times bidirectional models; stream says what each chunk takes.");
    anyflow::Engine engine(bundle, given.engine());
    const auto rounds = static_cast<std::size_t>(given.number("--rounds", 10));
    if (rounds < 1) throw std::invalid_argument("--rounds is 0; allowed are whole numbers from 1.");
    anyflow::Text text({1, info.text_tokens, info.text_channels});
    anyflow::check(anyflow_noise(1, text.data.data(), text.data.size()));
    auto run = engine.start(given.noise(info), text);
    std::vector<double> seconds;
    for (std::size_t i = 0; i <= rounds; ++i) {
      const auto started = std::chrono::steady_clock::now();
      run.step({500}, {500});
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - started;
      if (i > 0) seconds.push_back(taken.count());  // the first one warms up
    }
    std::sort(seconds.begin(), seconds.end());
    std::cout << engine.description() << "\n"
              << "{\"rounds\": " << rounds << ", \"min\": " << seconds.front() << ", \"median\": " << seconds[rounds / 2]
              << ", \"max\": " << seconds.back() << ", \"bundle\": \"" << info.digest << "\"}\n";
  });
}
