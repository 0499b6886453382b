# Finds what the library is built on, and says what is left out and what it would need.

# Where ANYFLOW_PYTHON has a package (which is not imported); empty where there is none.
function(anyflow_python_package name result)
  set(${result} "" PARENT_SCOPE)
  if(ANYFLOW_PYTHON)
    set(code "from importlib.util import find_spec as f; print(f('${name}').submodule_search_locations[0])")
    execute_process(COMMAND ${ANYFLOW_PYTHON} -c "${code}" OUTPUT_VARIABLE answer ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
    if(NOT failed)
      set(${result} "${answer}" PARENT_SCOPE)
    endif()
  endif()
endfunction()

# Sets ANYFLOW_WITH_<name>, or ends where it was asked for and is missing.
macro(anyflow_decide name found missing)
  set(ANYFLOW_WITH_${name} OFF)
  if(ANYFLOW_${name} STREQUAL "OFF" OR ANYFLOW_${name} STREQUAL "0")
    message(STATUS "anyflow: ${name} is switched off")
  elseif(${found})
    set(ANYFLOW_WITH_${name} ON)
    message(STATUS "anyflow: ${name} is built")
  elseif(ANYFLOW_${name} STREQUAL "AUTO")
    message(STATUS "anyflow: ${name} is left out: ${missing}")
  else()
    message(FATAL_ERROR "anyflow: ${name} was asked for and cannot be built: ${missing}")
  endif()
endmacro()

# nlohmann-json: header only, so nothing is left of it in the library's interface.
anyflow_python_package(nlohmann_json anyflow_json_hint)
find_path(ANYFLOW_JSON_INCLUDE nlohmann/json.hpp HINTS ${anyflow_json_hint}/include)
if(NOT ANYFLOW_JSON_INCLUDE)
  message(FATAL_ERROR "anyflow: nlohmann/json.hpp was not found. Run: apt install nlohmann-json3-dev, or pip install nlohmann-json and give "
                      "-DANYFLOW_PYTHON=python3, or give -DANYFLOW_JSON_INCLUDE=FOLDER.")
endif()

if(NOT ANYFLOW_OPENSSL STREQUAL "OFF")
  find_package(OpenSSL 1.1.1 QUIET COMPONENTS Crypto)
endif()
anyflow_decide(OPENSSL OPENSSL_FOUND "its headers were not found (apt install libssl-dev). Hashes are computed by portable code, more slowly")

# torch's wheel is a complete C++ distribution. Its libraries are named here: its CMake package would look for CUDA and more.
if(NOT ANYFLOW_AOTINDUCTOR STREQUAL "OFF")
  anyflow_python_package(torch anyflow_torch_hint)
  find_path(ANYFLOW_TORCH_INCLUDE torch/csrc/inductor/aoti_package/model_package_loader.h HINTS ${anyflow_torch_hint}/include)
  foreach(name c10 torch torch_cpu)
    find_library(ANYFLOW_TORCH_${name} ${name} HINTS ${anyflow_torch_hint}/lib ${ANYFLOW_TORCH_INCLUDE}/../lib)
    list(APPEND ANYFLOW_TORCH_LIBRARIES ${ANYFLOW_TORCH_${name}})
  endforeach()
endif()
set(anyflow_torch_found OFF)
if(ANYFLOW_TORCH_INCLUDE AND ANYFLOW_TORCH_c10 AND ANYFLOW_TORCH_torch AND ANYFLOW_TORCH_torch_cpu)
  set(anyflow_torch_found ON)
endif()
anyflow_decide(AOTINDUCTOR anyflow_torch_found "PyTorch was not found; pip install torch, and give -DANYFLOW_PYTHON=python3")

include(AnyflowTensorRT)
