// Runs a libFuzzer target without libFuzzer: mutations of given files, from a seed, so that every run is the same and needs no
// clang.
//
//   fuzz_manifest ROUNDS SEED FILE…
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

const std::vector<std::string> words = {"null",
                                        "true",
                                        "-1",
                                        "0",
                                        "1e999",
                                        "9223372036854775807",
                                        "9223372036854775808",
                                        "18446744073709551616",
                                        "1.5",
                                        "[]",
                                        "{}",
                                        "\"",
                                        "\"\"",
                                        "\\u0000",
                                        "\\ud800",
                                        "\xff",
                                        "[[[[",
                                        "{\"a\":",
                                        ",",
                                        "}",
                                        "../",
                                        "-9223372036854775808"};

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  std::string mutated(std::string text) {
    for (size_t i = 1 + below(4); i > 0; --i) change(text);
    return text;
  }

  size_t below(size_t limit) { return limit ? random_() % limit : 0; }

 private:
  void change(std::string& text) {
    const size_t at = below(text.size() + 1), count = std::min(below(24), text.size() - at);
    switch (below(6)) {
      case 0:
        text.erase(at, count);
        break;
      case 1:
        text.insert(at, text.substr(below(text.size() + 1), below(40)));
        break;
      case 2:
        text.insert(at, words[below(words.size())]);
        break;
      case 3:
        replace_value(text, at);
        break;
      case 4:
        if (at < text.size()) text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
        break;
      default:
        text.resize(at);
        break;
    }
  }

  // A whole value after a colon: what gets past the parser and into the reader.
  void replace_value(std::string& text, size_t at) {
    const size_t colon = text.find(':', at);
    if (colon == std::string::npos) return;
    const size_t end = text.find_first_of(",}]\n", colon);
    text.replace(colon + 1, end == std::string::npos ? end : end - colon - 1, words[below(words.size())]);
  }

  std::mt19937_64 random_;
};

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) return std::puts("usage: ROUNDS SEED FILE…"), 2;
  std::vector<std::string> corpus;
  for (int i = 3; i < count; ++i) {
    std::ifstream file(arguments[i], std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  Mutator mutator(std::strtoull(arguments[2], nullptr, 10));
  const long rounds = std::atol(arguments[1]);
  for (long i = 0; i < rounds; ++i) {
    const std::string text = mutator.mutated(corpus[mutator.below(corpus.size())]);
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(text.data()), text.size());
  }
  std::printf("%ld inputs\n", rounds);
}
