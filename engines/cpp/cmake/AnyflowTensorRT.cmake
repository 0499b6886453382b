# Finds TensorRT or TensorRT for RTX, and the headers and the CUDA runtime to either. Both libraries have the same classes and
# functions, so only one of them can be linked.

if(NOT ANYFLOW_TENSORRT_RTX MATCHES "^(AUTO|OFF|0)$")
  if(NOT ANYFLOW_TENSORRT MATCHES "^(AUTO|OFF|0)$")
    message(FATAL_ERROR "anyflow: ANYFLOW_TENSORRT and ANYFLOW_TENSORRT_RTX are both asked for, and one library can have one of them: both "
                        "bring the same functions. Build two libraries in two folders.")
  endif()
  set(ANYFLOW_TENSORRT OFF)
endif()
if(NOT ANYFLOW_TENSORRT STREQUAL "OFF" OR NOT ANYFLOW_TENSORRT_RTX STREQUAL "OFF")
  find_package(CUDAToolkit QUIET)
endif()

# What a header folder is of, as "TensorRT 10.16" or "TensorRT for RTX 1.6", and whether its interface is that of TensorRT for RTX.
function(anyflow_rtx_headers folder title fits)
  set(library TensorRT)
  file(STRINGS ${folder}/NvInferVersion.h lines REGEX "^#define (NV_TENSORRT_|TRT_)(MAJOR|MINOR)(_RTX|_ENTERPRISE)? [0-9]+")
  foreach(part MAJOR MINOR)
    string(REGEX MATCH "${part}(_[A-Z]+)? ([0-9]+)" found "${lines}")
    set(${part} "${CMAKE_MATCH_2}")
  endforeach()
  if("${lines}" MATCHES "_RTX ")
    set(library "TensorRT for RTX")
  endif()
  set(${title} "${library} ${MAJOR}.${MINOR}" PARENT_SCOPE)
  # 1.5 took functions out of the classes, and left what TensorRT 11 has; releases since have put theirs behind.
  set(${fits} OFF PARENT_SCOPE)
  if((library STREQUAL "TensorRT" AND MAJOR EQUAL 11) OR (NOT library STREQUAL "TensorRT" AND "${MAJOR}.${MINOR}" VERSION_GREATER_EQUAL 1.5))
    set(${fits} ON PARENT_SCOPE)
  endif()
endfunction()

if(NOT ANYFLOW_TENSORRT STREQUAL "OFF")
  find_path(ANYFLOW_TENSORRT_INCLUDE NvInferRuntime.h HINTS ${TensorRT_ROOT}/include $ENV{TensorRT_ROOT}/include
            PATH_SUFFIXES ${CMAKE_LIBRARY_ARCHITECTURE})
  find_library(ANYFLOW_TENSORRT_LIBRARY nvinfer HINTS ${TensorRT_ROOT}/lib $ENV{TensorRT_ROOT}/lib)
endif()
set(anyflow_tensorrt_found OFF)
if(TARGET CUDA::cudart AND ANYFLOW_TENSORRT_INCLUDE AND ANYFLOW_TENSORRT_LIBRARY)
  set(anyflow_tensorrt_found ON)
endif()
anyflow_decide(TENSORRT anyflow_tensorrt_found
               "TensorRT (10.3 or later) or the CUDA toolkit was not found; install both, and give -DTensorRT_ROOT=FOLDER if they are elsewhere")

if(ANYFLOW_WITH_TENSORRT)
  set(ANYFLOW_TENSORRT_RTX OFF)
endif()
set(anyflow_rtx_missing "")
if(NOT ANYFLOW_TENSORRT_RTX STREQUAL "OFF")
  # The wheel holds the library under its full name, and no headers.
  anyflow_python_package(tensorrt_rtx_libs anyflow_rtx_hint)
  find_library(ANYFLOW_TENSORRT_RTX_LIBRARY NAMES tensorrt_rtx libtensorrt_rtx.so.1
               HINTS ${TensorRT_RTX_ROOT}/lib $ENV{TensorRT_RTX_ROOT}/lib ${anyflow_rtx_hint})
  find_path(ANYFLOW_TENSORRT_RTX_INCLUDE NvInferRuntime.h HINTS ${TensorRT_RTX_ROOT}/include $ENV{TensorRT_RTX_ROOT}/include
            PATH_SUFFIXES ${CMAKE_LIBRARY_ARCHITECTURE})
  set(anyflow_rtx_remedy "Take those of NVIDIA's SDK of TensorRT for RTX, 1.5 or later (developer.nvidia.com/tensorrt-rtx), or those of TensorRT 11 "
      "(include/ of github.com/NVIDIA/TensorRT), which fit, but know no CUDA graphs of RTX: -DTensorRT_RTX_ROOT=FOLDER or "
      "-DANYFLOW_TENSORRT_RTX_INCLUDE=FOLDER")
  string(CONCAT anyflow_rtx_remedy ${anyflow_rtx_remedy})
  if(NOT ANYFLOW_TENSORRT_RTX_LIBRARY)
    string(APPEND anyflow_rtx_missing "libtensorrt_rtx was not found: pip install tensorrt-rtx-cu12 (or -cu13) and give -DANYFLOW_PYTHON=python3, or "
           "give -DTensorRT_RTX_ROOT=FOLDER, where NVIDIA's SDK lies. ")
  endif()
  if(NOT ANYFLOW_TENSORRT_RTX_INCLUDE)
    string(APPEND anyflow_rtx_missing "NvInferRuntime.h was not found; the wheel has no headers. ${anyflow_rtx_remedy}. ")
  else()
    anyflow_rtx_headers(${ANYFLOW_TENSORRT_RTX_INCLUDE} anyflow_rtx_title anyflow_rtx_fits)
    if(NOT anyflow_rtx_fits)
      string(APPEND anyflow_rtx_missing "the headers in ${ANYFLOW_TENSORRT_RTX_INCLUDE} are those of ${anyflow_rtx_title}, whose interface is another: a "
             "program that is compiled with them crashes. ${anyflow_rtx_remedy}. ")
    endif()
  endif()
  if(NOT TARGET CUDA::cudart)
    string(APPEND anyflow_rtx_missing "The CUDA toolkit (12 or 13) was not found; install it, or give -DCUDAToolkit_ROOT=FOLDER. ")
  endif()
  string(STRIP "${anyflow_rtx_missing}" anyflow_rtx_missing)
endif()
set(anyflow_rtx_found OFF)
if(anyflow_rtx_missing STREQUAL "")
  set(anyflow_rtx_found ON)
endif()
anyflow_decide(TENSORRT_RTX anyflow_rtx_found "${anyflow_rtx_missing}")
if(ANYFLOW_WITH_TENSORRT_RTX)
  message(STATUS "anyflow: TENSORRT_RTX: ${ANYFLOW_TENSORRT_RTX_LIBRARY}, headers of ${anyflow_rtx_title}")
endif()
