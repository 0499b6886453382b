// The processor's instruction sets in one word, as engine.json has them; see engines/torch_common/device.py.
#pragma once

#include <string>

namespace af {

// `level`: as torch calls it, "AVX512". A package with an instruction that is not here would end the process without a message.
std::string instructions(const std::string& level, const std::string& cpuinfo = "/proc/cpuinfo");
// "x86_64", "aarch64": as Python's platform.machine().
std::string machine();

}  // namespace af
