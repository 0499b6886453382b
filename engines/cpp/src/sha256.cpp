#include "sha256.hpp"

#include <array>
#include <cstring>

#ifdef ANYFLOW_WITH_OPENSSL
#include <openssl/evp.h>
#endif

#include "error.hpp"

namespace af {
namespace {

constexpr char digits[] = "0123456789abcdef";

std::string hexadecimal(std::span<const unsigned char> bytes) {
  std::string text;
  for (const unsigned char byte : bytes) text += digits[byte >> 4], text += digits[byte & 15];
  return text;
}

}  // namespace

#ifdef ANYFLOW_WITH_OPENSSL

struct Sha256::State {
  EVP_MD_CTX* context = EVP_MD_CTX_new();
  ~State() { EVP_MD_CTX_free(context); }
  static void check(int done) {
    if (done != 1) throw Error(ANYFLOW_INTERNAL, "OpenSSL could not compute a SHA-256.");
  }
};

Sha256::Sha256() : state_(std::make_unique<State>()) { State::check(EVP_DigestInit_ex(state_->context, EVP_sha256(), nullptr)); }

void Sha256::update(std::span<const unsigned char> data) {
  State::check(EVP_DigestUpdate(state_->context, data.data(), data.size()));
}

std::string Sha256::finish() {
  std::array<unsigned char, 32> digest{};
  State::check(EVP_DigestFinal_ex(state_->context, digest.data(), nullptr));
  return hexadecimal(digest);
}

#else

namespace {

// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
constexpr std::array<uint32_t, 64> k = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t rotated(uint32_t x, int by) { return x >> by | x << (32 - by); }

}  // namespace

struct Sha256::State {
  std::array<uint32_t, 8> h = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> block{};
  size_t filled = 0;
  uint64_t length = 0;

  void compress(const unsigned char* data) {
    std::array<uint32_t, 64> w{};
    for (size_t i = 0; i < 16; ++i) {
      w[i] = uint32_t{data[4 * i]} << 24 | uint32_t{data[4 * i + 1]} << 16 | uint32_t{data[4 * i + 2]} << 8 | data[4 * i + 3];
    }
    for (size_t i = 16; i < 64; ++i) {
      const uint32_t a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + (rotated(a, 7) ^ rotated(a, 18) ^ a >> 3) + w[i - 7] + (rotated(b, 17) ^ rotated(b, 19) ^ b >> 10);
    }
    auto [a, b, c, d, e, f, g, last] = h;
    for (size_t i = 0; i < 64; ++i) {
      const uint32_t one = last + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) + k[i] + w[i];
      const uint32_t two = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      last = g, g = f, f = e, e = d + one, d = c, c = b, b = a, a = one + two;
    }
    const std::array<uint32_t, 8> now = {a, b, c, d, e, f, g, last};
    for (size_t i = 0; i < 8; ++i) h[i] += now[i];
  }
};

Sha256::Sha256() : state_(std::make_unique<State>()) {}

void Sha256::update(std::span<const unsigned char> data) {
  State& s = *state_;
  s.length += data.size();
  while (!data.empty()) {
    if (s.filled == 0 && data.size() >= 64) {
      s.compress(data.data());
      data = data.subspan(64);
      continue;
    }
    const size_t count = std::min(data.size(), 64 - s.filled);
    std::memcpy(s.block.data() + s.filled, data.data(), count);
    data = data.subspan(count), s.filled += count;
    if (s.filled == 64) s.compress(s.block.data()), s.filled = 0;
  }
}

std::string Sha256::finish() {
  const uint64_t bits = state_->length * 8;
  const std::array<unsigned char, 64> padding = {0x80};
  const size_t filled = state_->filled;
  update({padding.data(), filled < 56 ? 56 - filled : 120 - filled});
  std::array<unsigned char, 8> tail{};
  for (size_t i = 0; i < 8; ++i) tail[i] = static_cast<unsigned char>(bits >> (56 - 8 * i));
  update(tail);
  std::array<unsigned char, 32> digest{};
  for (size_t i = 0; i < 32; ++i) digest[i] = static_cast<unsigned char>(state_->h[i / 4] >> (24 - 8 * (i % 4)));
  return hexadecimal(digest);
}

#endif

Sha256::~Sha256() = default;

std::string sha256_of(const std::string& text) {
  Sha256 hash;
  hash.update({reinterpret_cast<const unsigned char*>(text.data()), text.size()});
  return hash.finish();
}

}  // namespace af
