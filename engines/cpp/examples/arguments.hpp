// Flags of the examples: --name value, checked against those there are.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "anyflow/anyflow.hpp"

class Arguments {
 public:
  Arguments(int count, char** words, const std::string& usage, const std::vector<std::string>& flags) {
    for (int i = 1; i < count; ++i) {
      const std::string word = words[i];
      if (word.rfind("--", 0) != 0 && bundle.empty()) {
        bundle = word;
      } else if (std::find(flags.begin(), flags.end(), word) != flags.end() && i + 1 < count) {
        values_[word] = words[++i];
      } else {
        throw std::invalid_argument(word + " was not understood.\n" + usage);
      }
    }
    if (bundle.empty()) throw std::invalid_argument(usage);
  }

  bool has(const std::string& flag) const { return values_.count(flag) > 0; }
  std::string text(const std::string& flag, const std::string& otherwise = "") const {
    return has(flag) ? values_.at(flag) : otherwise;
  }
  double number(const std::string& flag, double otherwise) const {
    return has(flag) ? parsed(flag, values_.at(flag)) : otherwise;
  }
  // "1,3,3"
  std::vector<std::int64_t> numbers(const std::string& flag) const {
    std::vector<std::int64_t> found;
    std::istringstream words(text(flag));
    for (std::string word; std::getline(words, word, ',');) found.push_back(static_cast<std::int64_t>(parsed(flag, word)));
    return found;
  }

  // Noise from --noise FILE (tensor "latents"), or from --seed in the size of --latents F,H,W or of the bundle's own video.
  anyflow::Latents noise(const anyflow_bundle_info& info) const {
    if (has("--noise")) return anyflow::load<5>(text("--noise"), "latents");
    auto size = numbers("--latents");
    if (size.empty()) size = {info.frames, info.height, info.width};
    if (size.size() != 3) throw std::invalid_argument("--latents takes frames,height,width in latent units.");
    return anyflow::noise({1, size[0], info.channels, size[1], size[2]}, static_cast<std::uint64_t>(number("--seed", 0)));
  }

  // --deadline SECONDS, or --steps N; else the bundle's own steps.
  anyflow::Sampling sampling(const anyflow_bundle_info& info) const {
    anyflow::Sampling how;
    if (has("--deadline")) {
      how.deadline.emplace();
      how.deadline->seconds = number("--deadline", 0), how.deadline->shift = info.shift;
    }
    if (has("--steps")) how.schedule = anyflow::Schedule::uniform(static_cast<std::int64_t>(number("--steps", 0)), info.shift);
    return how;
  }

  anyflow::EngineOptions engine() const {
    anyflow::EngineOptions options;
    options.backend = text("--backend"), options.engine = text("--engine"),
    options.threads = static_cast<int>(number("--threads", 0));
    return options;
  }

  std::string bundle;

 private:
  static double parsed(const std::string& flag, const std::string& word) {
    char* end = nullptr;
    const double value = std::strtod(word.c_str(), &end);
    if (end == word.c_str() || *end) throw std::invalid_argument(flag + " takes numbers, not '" + word + "'.");
    return value;
  }

  std::map<std::string, std::string> values_;
};

// Runs `work`; what is wrong goes to stderr in one line, and the exit status is 1.
template <typename F>
int told(F work) {
  try {
    work();
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
