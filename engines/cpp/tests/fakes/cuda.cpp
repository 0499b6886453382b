// CUDA's runtime without a GPU; see machine.hpp.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "state.hpp"

using namespace standin;

namespace {

bool this_thread_captures() {
  return std::any_of(state().streams.begin(), state().streams.end(), [](const auto& item) {
    return item.second->capture && item.second->capturer == std::this_thread::get_id();
  });
}

void not_while_capturing(const char* what) {
  if (this_thread_captures()) violation(std::string(what) + " while this thread captures a stream: CUDA ends the capture");
}

cudaError_t told(cudaError_t code) {
  if (code != cudaSuccess) last = code;
  return code;
}

#define STANDIN_CALL()                                       \
  const std::lock_guard<std::recursive_mutex> lock(mutex()); \
  if (state().lost) return told(cudaErrorIllegalAddress)

}  // namespace

extern "C" {

const char* standin_report(void) {
  static char text[512];
  const Counters& c = counters();
  std::snprintf(
      text, sizeof text,
      "{\"runtimes\": %lld, \"engines\": %lld, \"contexts\": %lld, \"streams\": %lld, \"graphs\": %lld, \"allocations\": "
      "%lld, \"bytes\": %lld, \"most_bytes\": %lld, \"contexts_made\": %lld, \"enqueued\": %lld, \"captured\": %lld, "
      "\"launched\": %lld, \"streams_made\": %lld, \"allocated\": %lld, \"configurations\": %lld, \"own_graphs\": %lld}",
      static_cast<long long>(c.runtimes), static_cast<long long>(c.engines), static_cast<long long>(c.contexts),
      static_cast<long long>(c.streams), static_cast<long long>(c.graphs), static_cast<long long>(c.allocations),
      static_cast<long long>(c.bytes), static_cast<long long>(c.most_bytes), static_cast<long long>(c.contexts_made),
      static_cast<long long>(c.enqueued), static_cast<long long>(c.captured), static_cast<long long>(c.launched),
      static_cast<long long>(c.streams_made), static_cast<long long>(c.allocated), static_cast<long long>(c.configurations),
      static_cast<long long>(c.own_graphs));
  return text;
}

// Devices and errors.

cudaError_t cudaGetDeviceCount(int* count) {
  STANDIN_CALL();
  if (number("devices", 1) == 0) return told(cudaErrorInsufficientDriver);
  *count = static_cast<int>(number("devices", 1));
  return cudaSuccess;
}

// Both work where there is no driver.
cudaError_t cudaDriverGetVersion(int* version) {
  *version = static_cast<int>(number("driver", number("devices", 1) ? CUDART_VERSION : 0));
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int index) {
  STANDIN_CALL();
  if (index < 0 || index >= number("devices", 1)) return told(cudaErrorInvalidDevice);
  device = index;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* properties, int index) {
  STANDIN_CALL();
  if (index < 0 || index >= number("devices", 1)) return told(cudaErrorInvalidDevice);
  std::memset(properties, 0, sizeof *properties);
  std::snprintf(properties->name, sizeof properties->name, "%s", setting("name", "NVIDIA Stand-in").c_str());
  std::sscanf(setting("capability", STANDIN_CAPABILITY).c_str(), "%d.%d", &properties->major, &properties->minor);
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "an error, in words";
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorIllegalAddress       ? "cudaErrorIllegalAddress"
         : error == cudaErrorInsufficientDriver ? "cudaErrorInsufficientDriver"
                                                : "cudaErrorOfSomeKind";
}

cudaError_t cudaGetLastError(void) { return std::exchange(last, cudaSuccess); }

// Memory.

cudaError_t cudaMalloc(void** address, size_t size) {
  STANDIN_CALL();
  not_while_capturing("cudaMalloc");
  const uintptr_t made = reserve(size);
  if (!made) return told(cudaErrorMemoryAllocation);
  *address = reinterpret_cast<void*>(made);
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  not_while_capturing("cudaFree");
  if (address) release(reinterpret_cast<uintptr_t>(address));
  return state().lost ? told(cudaErrorIllegalAddress) : cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
  STANDIN_CALL();
  *total = static_cast<size_t>(number("memory", int64_t{1} << 32));
  *left = *total - static_cast<size_t>(counters().bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  STANDIN_CALL();
  const Range target{reinterpret_cast<uintptr_t>(to), size, "a copy's target"};
  const Range source{reinterpret_cast<uintptr_t>(from), size, "a copy's source"};
  const bool up = kind == cudaMemcpyHostToDevice, down = kind == cudaMemcpyDeviceToHost;
  if (!up && !down && kind != cudaMemcpyDeviceToDevice) violation("a copy of a kind that the backend has no use for");
  if (on_device(target.address) == down || on_device(source.address) == up)
    violation("a copy's kind is not that of its addresses: " + shown(source) + " to " + shown(target));
  if (!up && !down && overlap(source, target)) violation("a copy within the device overlaps itself: " + shown(target));
  const int on = device_of(stream);
  if (!up) check_reserved(source, on);
  if (!down) check_reserved(target, on);
  if ((up || down) && capturing(stream)) violation("a copy of the host's memory is captured: it would be read at every launch");
  Work work;
  if (!up) work.reads.push_back(source);
  if (!down) work.writes.push_back(target);
  work.run = [=] {
    const uint8_t* start = up ? static_cast<const uint8_t*>(from) : reading(source, on);
    uint8_t* end = down ? static_cast<uint8_t*>(to) : writing(target, on);
    if (size) std::memcpy(end, start, size);
  };
  put(stream, std::move(work), "cudaMemcpyAsync");
  return cudaSuccess;
}

// Streams.

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int flags) {
  STANDIN_CALL();
  if (flags != cudaStreamNonBlocking) violation("a stream that waits for the default one");
  auto made = std::make_unique<CUstream_st>();
  made->device = device;
  *stream = made.get();
  state().streams[made.get()] = std::move(made);
  ++counters().streams, ++counters().streams_made;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  if (!used(stream).pending.empty() && !state().lost) violation("a stream with work on it was destroyed");
  if (used(stream).capture) violation("a stream was destroyed while it was captured");
  state().streams.erase(stream);
  --counters().streams;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  STANDIN_CALL();
  if (used(stream).capture) violation("a stream is waited for while it is captured");
  if (++state().waits == number("lost_at", -1)) {
    state().lost = true;  // as after a bad address in a kernel: nothing works in this process any more
    return told(cudaErrorIllegalAddress);
  }
  auto work = std::exchange(used(stream).pending, {});
  for (Work& one : work) one.run();
  return cudaSuccess;
}

// Graphs.

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  STANDIN_CALL();
  if (mode != cudaStreamCaptureModeThreadLocal) violation("a capture that other threads' calls would end");
  used(stream).capture = std::make_unique<CUgraph_st>();
  used(stream).capturer = std::this_thread::get_id();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  STANDIN_CALL();
  if (!used(stream).capture) violation("the end of a capture that never began");
  *graph = nullptr;
  auto made = std::move(used(stream).capture);
  if (number("capture_fails", 0)) return told(cudaErrorStreamCaptureInvalidated);
  *graph = made.get();
  state().graphs[made.get()] = std::move(made);
  ++counters().graphs, ++counters().captured;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  STANDIN_CALL();
  if (number("instantiate_fails", 0)) return told(cudaErrorMemoryAllocation);
  auto made = std::make_unique<CUgraphExec_st>();
  made->nodes = graph->nodes;
  *executable = made.get();
  state().executables[made.get()] = std::move(made);
  ++counters().graphs;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  if (!state().graphs.erase(graph)) violation("a graph was destroyed that does not exist");
  --counters().graphs;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  const std::lock_guard<std::recursive_mutex> lock(mutex());
  if (!state().executables.erase(executable)) violation("an executable graph was destroyed that does not exist");
  --counters().graphs;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  STANDIN_CALL();
  if (!state().executables.contains(executable)) violation("a graph was launched that does not exist");
  if (device != device_of(stream)) violation("a graph was launched on a stream of another device than the current one");
  for (const Work& node : executable->nodes) {
    if (node.context && !node.context->alive) violation("a graph was launched whose execution context is gone");
    put(stream, node, "cudaGraphLaunch");
  }
  ++counters().launched;
  return cudaSuccess;
}

}  // extern "C"
