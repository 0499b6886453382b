// Which backends there are. Preferred first.
#include "engine.hpp"
#include "tensorrt_library.hpp"

namespace af {

#ifdef ANYFLOW_WITH_TENSORRT
std::shared_ptr<Engine> open_tensorrt(std::shared_ptr<const Bundle> bundle, const EngineOptions& options);
#endif
#ifdef ANYFLOW_WITH_AOTINDUCTOR
std::shared_ptr<Engine> open_aotinductor(std::shared_ptr<const Bundle> bundle, const EngineOptions& options);
#endif

std::vector<Backend>& backends() {
  static std::vector<Backend> all = {
#ifdef ANYFLOW_WITH_TENSORRT
      {trt::library.backend, "cuda", open_tensorrt},
#endif
#ifdef ANYFLOW_WITH_AOTINDUCTOR
      {"aotinductor", "cpu", open_aotinductor},
#endif
  };
  return all;
}

}  // namespace af
