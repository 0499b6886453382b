// A machine with a GPU, acted, for testing the TensorRT backend where there is none: CUDA's runtime (cuda.cpp) on ordinary memory
// and TensorRT's (nvinfer.cpp) on plans that are a few lines of text, both behind NVIDIA's own headers. tests/fakes/cpp_tensorrt.py
// builds it and repeats the plans' arithmetic in numpy.
//
// It is stricter than a GPU. Device addresses cannot be read from the host, and none is ever used twice; new memory counts as
// unknown until something is written; work is done as late as CUDA may do it, when a stream is waited for; whatever CUDA or
// TensorRT leaves undefined ends the process with a word (`violation`), as does anything that is left when the process ends.
//
// ANYFLOW_STANDIN describes the machine: "devices=2,capability=9.0,name=NVIDIA Stand-in,memory=1000000,version=10.3.0".
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace standin {

// What must never happen: says so, with a stack where a sanitizer can give one, and ends the process.
[[noreturn]] void violation(const std::string& what);

// A setting of ANYFLOW_STANDIN.
std::string setting(const std::string& key, const std::string& otherwise);
int64_t number(const std::string& key, int64_t otherwise);

// Every call of both libraries holds it.
std::recursive_mutex& mutex();

struct Range {
  uintptr_t address;
  size_t size;
  const char* what;  // for messages
};
bool overlap(const Range& a, const Range& b);

// What an execution context is to a captured graph: it has to be alive and as it was.
struct ContextMark {
  bool alive = true, captured = false;
};

struct Work {
  std::function<void()> run;
  std::vector<Range> reads, writes;
  std::shared_ptr<ContextMark> context;  // of TensorRT's, or nullptr
};

int current_device();
// Put work on a stream, or into the graph that is being captured from it.
void put(cudaStream_t stream, Work work, const char* what);
bool capturing(cudaStream_t stream);
int device_of(cudaStream_t stream);
// Work of this context that is not done yet.
bool pending(const ContextMark* context);
// CUDA's last error of this thread, which is left as it is.
cudaError_t last_error();
// The device failed for good: nothing works any more but giving back.
bool lost();

// Device memory that exists and belongs to `device`, as bytes of the host.
uint8_t* reading(const Range& range, int device);  // all of it was written
uint8_t* writing(const Range& range, int device);  // counts as written now
void spoil(const Range& range, int device);        // counts as unknown now
void check_reserved(const Range& range, int device);

// Memory that a library reserves for itself; 0: there is none left.
uintptr_t reserve(size_t size);
void release(uintptr_t address);

// What lives, and what was done.
struct Counters {
  int64_t runtimes = 0, engines = 0, contexts = 0, streams = 0, graphs = 0, allocations = 0, bytes = 0;
  int64_t most_bytes = 0, contexts_made = 0, enqueued = 0, captured = 0, launched = 0, streams_made = 0, allocated = 0;
  int64_t configurations = 0, own_graphs = 0;  // of TensorRT for RTX: what lives; contexts that are to capture graphs themselves
};
Counters& counters();

}  // namespace standin

// {"contexts": 1, …}; found by name, so that a program need not be linked to the stand-in to ask.
extern "C" const char* standin_report(void);
