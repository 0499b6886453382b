// Structs of the public header that carry their size: read with zeros for what an older program does not know, written only as
// far as the caller's reaches.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <string>

#include "error.hpp"

namespace af {

inline constexpr size_t largest_struct = 4096;

inline void check_size(const char* name, size_t size) {
  if (size < sizeof(size_t) || size > largest_struct) {
    throw Error(ANYFLOW_INVALID,
                std::string(name) + ".struct_size is " + std::to_string(size) + "; set it with ANYFLOW_INIT(" + name + ").");
  }
}

// A copy, zeros for NULL. What a newer program sets beyond what is known here is refused: it would be ignored.
template <typename T>
T taken(const char* name, const T* given) {
  T mine{};
  if (!given) return mine;
  check_size(name, given->struct_size);
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  if (given->struct_size > sizeof(T) &&
      std::any_of(bytes + sizeof(T), bytes + given->struct_size, [](unsigned char byte) { return byte != 0; })) {
    throw Error(ANYFLOW_INVALID,
                std::string(name) + " has fields that this version of the library does not know. Update the library.");
  }
  std::memcpy(&mine, given, std::min(given->struct_size, sizeof(T)));
  return mine;
}

// Write a result into the caller's struct.
template <typename T>
void give(const char* name, T result, T* to) {
  if (!to) throw Error(ANYFLOW_INVALID, std::string(name) + " is NULL; give the address of one.");
  check_size(name, to->struct_size);
  const size_t size = to->struct_size;
  result.struct_size = size;
  std::memcpy(to, &result, std::min(size, sizeof(T)));
}

}  // namespace af
