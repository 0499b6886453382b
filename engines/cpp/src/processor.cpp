#include "processor.hpp"

#include <sys/utsname.h>

#include <fstream>
#include <regex>
#include <set>
#include <sstream>

#include "sha256.hpp"

namespace af {
namespace {

// Names in /proc/cpuinfo of what a compiler may use. The same expression as in engines/torch_common/device.py; a test compares.
const std::regex& known_instructions() {
  static const std::regex known(
      "sse|ssse|pni$|avx|fma$|f16c$|bmi|abm$|popcnt$|movbe$|gfni$|vaes$|vpclmul|amx|adx$|clwb$|cldemote$|"
      "asimd|sve|sme|fp16|fphp|bf16|i8mm|atomics$|dcpop$|fcma$|jscvt$|lrcpc");
  return known;
}

std::set<std::string> listed(const std::string& cpuinfo) {
  std::set<std::string> words;
  std::ifstream file(cpuinfo);
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos || !(line.starts_with("flags") || line.starts_with("Features"))) continue;
    std::istringstream rest(line.substr(colon + 1));
    for (std::string word; rest >> word;) {
      if (std::regex_search(word, known_instructions(), std::regex_constants::match_continuous)) words.insert(word);
    }
    break;
  }
  return words;
}

}  // namespace

std::string machine() {
  utsname name{};
  return uname(&name) == 0 ? name.machine : "unknown";
}

std::string instructions(const std::string& level, const std::string& cpuinfo) {
  std::set<std::string> words = listed(cpuinfo);
  if (words.empty()) words.insert(machine());
  std::string joined;
  for (const std::string& word : words) joined += (joined.empty() ? "" : " ") + word;
  return level + " (" + std::to_string(words.size()) + ", " + sha256_of(joined).substr(0, 8) + ")";
}

}  // namespace af
