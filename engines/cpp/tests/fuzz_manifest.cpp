// Whatever stands in manifest.json: it is read, or refused with an error. Never anything else.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "bundle.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const af::Manifest manifest = af::parsed_manifest({reinterpret_cast<const char*>(data), size});
    for (const char* axis : {"batch", "frames", "height", "width", "text"}) {
      const af::Range& range = *manifest.ranges.find(axis);
      if (!range.holds(range.minimum) || !range.holds(range.nearest(7))) __builtin_trap();
    }
  } catch (const af::Damage&) {
  }
  return 0;
}
