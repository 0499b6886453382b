// Whatever stands in engine.json: it is read, or refused with an error. Never anything else.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "bundle.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    af::parsed_engine({reinterpret_cast<const char*>(data), size});
  } catch (const af::Damage&) {
  }
  return 0;
}
