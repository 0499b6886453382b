// Which of NVIDIA's two libraries this is compiled for: TensorRT, or TensorRT for RTX. Both have the same classes and functions,
// so a library of ours can have one of them; what differs is here. See engines/tensorrt/library.py.
#pragma once

#include <string>

namespace af::trt {

struct Library {
  const char* backend;      // in engine.json, and for callers
  const char* title;        // as NVIDIA calls it
  const char* version_key;  // in engine.json's versions
  bool rtx;
};

#ifdef ANYFLOW_TENSORRT_FOR_RTX
inline constexpr Library library{"tensorrt-rtx", "TensorRT for RTX", "tensorrt_rtx", true};
#else
inline constexpr Library library{"tensorrt", "TensorRT", "tensorrt", false};
#endif

// "10.3.0", of the library that is loaded.
std::string version();
// "TensorRT 10.3.0".
std::string title();
// Throws Error where the library that is loaded has another interface than the headers that this was compiled with.
void check_library();

}  // namespace af::trt
