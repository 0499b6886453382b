// What the stand-in's CUDA is made of, for cuda.cpp and device.cpp alone.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <thread>

#include "machine.hpp"

struct CUgraph_st {
  std::vector<standin::Work> nodes;
};
struct CUgraphExec_st {
  std::vector<standin::Work> nodes;
};
struct CUstream_st {
  int device;
  std::deque<standin::Work> pending;
  std::unique_ptr<CUgraph_st> capture;
  std::thread::id capturer;
};

namespace standin {

struct Allocation {
  int device;
  std::vector<uint8_t> bytes, known;
};

struct State {
  std::map<uintptr_t, Allocation> memory;
  std::map<CUstream_st*, std::unique_ptr<CUstream_st>> streams;
  std::map<CUgraph_st*, std::unique_ptr<CUgraph_st>> graphs;
  std::map<CUgraphExec_st*, std::unique_ptr<CUgraphExec_st>> executables;
  uintptr_t begin = 0, next = 0;
  int64_t waits = 0;
  bool lost = false;
};

State& state();
bool on_device(uintptr_t address);
std::string shown(const Range& range);
// The stream, if it may be used now.
CUstream_st& used(cudaStream_t stream);
// This thread's device and last error.
extern thread_local int device;
extern thread_local cudaError_t last;

}  // namespace standin
