// numpy's default_rng(seed).standard_normal: SeedSequence, PCG64 and the ziggurat of Marsaglia and Tsang with 256 layers. A seed
// then gives the same video from Python and from C++.
#include "noise.hpp"

#include <array>
#include <cmath>

namespace af {
namespace {

using U128 = unsigned __int128;

uint32_t hashmix(uint32_t value, uint32_t& constant) {
  value ^= constant;
  constant *= 0x931e8875U;
  value *= constant;
  return value ^ value >> 16;
}

uint32_t mix(uint32_t x, uint32_t y) {
  const uint32_t result = 0xca01f9ddU * x - 0x4973f715U * y;
  return result ^ result >> 16;
}

// SeedSequence(seed).generate_state(4, uint64).
std::array<uint64_t, 4> seeded_state(uint64_t seed) {
  std::array<uint32_t, 4> pool{};
  uint32_t constant = 0x43b0d7e5U;
  const std::array<uint32_t, 4> entropy = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), 0, 0};
  for (size_t i = 0; i < 4; ++i) pool[i] = hashmix(entropy[i], constant);
  for (size_t from = 0; from < 4; ++from) {
    for (size_t to = 0; to < 4; ++to) {
      if (from != to) pool[to] = mix(pool[to], hashmix(pool[from], constant));
    }
  }
  std::array<uint64_t, 4> state{};
  constant = 0x8b51f9ddU;
  for (size_t i = 0; i < 8; ++i) {
    uint32_t value = pool[i % 4] ^ constant;
    constant *= 0x58f38dedU;
    value *= constant;
    value ^= value >> 16;
    state[i / 2] |= uint64_t{value} << (32 * (i % 2));
  }
  return state;
}

class Pcg64 {
 public:
  explicit Pcg64(uint64_t seed) {
    const auto words = seeded_state(seed);
    increment_ = (U128{words[2]} << 64 | words[3]) << 1 | 1;
    state_ = increment_ + (U128{words[0]} << 64 | words[1]);
    advance();
  }

  uint64_t next() {
    advance();
    const auto folded = static_cast<uint64_t>(state_ >> 64) ^ static_cast<uint64_t>(state_);
    const auto by = static_cast<unsigned>(state_ >> 122);
    return folded >> by | folded << (-by & 63);
  }

  double uniform() { return static_cast<double>(next() >> 11) * (1.0 / 9007199254740992.0); }

 private:
  void advance() { state_ = state_ * (U128{0x2360ed051fc65da4U} << 64 | 0x4385df649fccf645U) + increment_; }

  U128 state_ = 0, increment_ = 0;
};

constexpr double tail = 3.6541528853610087963519472518;

// Layers of equal area under exp(-x^2/2): right ends in units of 2^-52 (w), densities there (f), and how much of each layer lies
// wholly inside (k).
struct Ziggurat {
  std::array<double, 256> w{}, f{};
  std::array<uint64_t, 256> k{};

  Ziggurat() {
    const long double scale = 4503599627370496.0L, r = 3.6541528853610087963519472518L;
    const long double area = r * std::exp(-r * r / 2) + std::sqrt(std::acos(-1.0L) / 2) * std::erfc(r / std::sqrt(2.0L));
    std::array<long double, 257> x{};
    x[255] = r;
    for (size_t i = 254; i > 0; --i) x[i] = std::sqrt(-2 * std::log(area / x[i + 1] + std::exp(-x[i + 1] * x[i + 1] / 2)));
    const long double base = area / std::exp(-r * r / 2);
    k[0] = static_cast<uint64_t>(r / base * scale), w[0] = static_cast<double>(base / scale), f[0] = 1;
    for (size_t i = 1; i < 256; ++i) {
      k[i] = static_cast<uint64_t>(x[i - 1] / x[i] * scale);
      w[i] = static_cast<double>(x[i] / scale), f[i] = static_cast<double>(std::exp(-x[i] * x[i] / 2));
    }
  }
};

double normal(Pcg64& random, const Ziggurat& layers) {
  for (;;) {
    const uint64_t bits = random.next();
    const size_t layer = bits & 255;
    const uint64_t place = bits >> 9 & 0xfffffffffffffULL;
    const double size = static_cast<double>(place) * layers.w[layer];
    const double x = bits >> 8 & 1 ? -size : size;
    if (place < layers.k[layer]) return x;
    if (layer == 0) {
      for (;;) {
        const double beyond = -std::log1p(-random.uniform()) / tail, height = -std::log1p(-random.uniform());
        if (height + height > beyond * beyond) return place >> 8 & 1 ? -(tail + beyond) : tail + beyond;
      }
    }
    if ((layers.f[layer - 1] - layers.f[layer]) * random.uniform() + layers.f[layer] < std::exp(-0.5 * x * x)) return x;
  }
}

}  // namespace

void fill_noise(uint64_t seed, float* values, size_t count) {
  static const Ziggurat layers;
  Pcg64 random(seed);
  for (size_t i = 0; i < count; ++i) values[i] = static_cast<float>(normal(random, layers));
}

}  // namespace af
