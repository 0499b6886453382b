#include "tensorrt_library.hpp"

#include <NvInferRuntime.h>

#include "error.hpp"

namespace af::trt {
namespace {

#ifdef TRT_MAJOR_RTX
constexpr int32_t rtx_major = TRT_MAJOR_RTX;
#else
constexpr int32_t rtx_major = 1;  // compiled with TensorRT 11's headers
#endif
constexpr int32_t rtx_minor = 5;  // 1.5 took functions out of the classes; releases since have put theirs at the end

}  // namespace

std::string version() {
  return std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) + "." +
         std::to_string(getInferLibPatchVersion());
}

std::string title() { return std::string(library.title) + " " + version(); }

// TensorRT compares versions itself when its runtime is made; TensorRT for RTX does not, and would be called in wrong places.
void check_library() {
  if constexpr (library.rtx) {
    const int32_t major = getInferLibMajorVersion();
    if (major != rtx_major || (major == 1 && getInferLibMinorVersion() < rtx_minor)) {
      throw Error(ANYFLOW_BACKEND, title() + " is loaded, and this library was compiled for " + std::to_string(rtx_major) +
                                       (rtx_major == 1 ? ".5 or a later 1.x" : ".x") +
                                       ". Put such a libtensorrt_rtx first in the search path, or compile again.");
    }
  }
}

}  // namespace af::trt
