// Noise from a seed, the same as anyflow_deploy.noise.
#pragma once

#include <cstddef>
#include <cstdint>

namespace af {

void fill_noise(uint64_t seed, float* values, size_t count);

}  // namespace af
