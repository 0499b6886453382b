// SHA-256 (FIPS 180-4). OpenSSL's where CMake found it (it uses the processor's own instructions), else a portable one.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace af {

class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void update(std::span<const unsigned char> data);
  // In hexadecimal; nothing may follow.
  std::string finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

std::string sha256_of(const std::string& text);

}  // namespace af
