// CUDA's runtime without a GPU; see machine.hpp.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <thread>
#include <utility>

#include "machine.hpp"

extern "C" void __sanitizer_print_stack_trace() __attribute__((weak));

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
namespace {

constexpr size_t space = size_t{1} << 38, granule = 512;

struct Allocation {
  int device;
  std::vector<uint8_t> bytes, known;
};

thread_local int device = 0;
thread_local cudaError_t last = cudaSuccess;

struct State {
  std::map<uintptr_t, Allocation> memory;
  std::map<CUstream_st*, std::unique_ptr<CUstream_st>> streams;
  std::map<CUgraph_st*, std::unique_ptr<CUgraph_st>> graphs;
  std::map<CUgraphExec_st*, std::unique_ptr<CUgraphExec_st>> executables;
  uintptr_t begin = 0, next = 0;
  int64_t waits = 0;
  bool lost = false;
};

void at_exit();

State& state() {
  static State* const only = [] {
    auto* made = new State;  // never destroyed: what is left is looked at when the process ends
    void* place = mmap(nullptr, space, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED) violation("no address space for the device");
    made->begin = reinterpret_cast<uintptr_t>(place);
    made->next = (made->begin + granule - 1) / granule * granule;
    std::atexit(at_exit);
    return made;
  }();
  return *only;
}

void at_exit() {
  Counters& c = counters();
  if (c.runtimes || c.engines || c.contexts || c.streams || c.graphs || c.allocations)
    violation(std::string("the process ends and these are left: ") + standin_report());
}

bool on_device(uintptr_t address) { return address >= state().begin && address < state().begin + space; }

std::string shown(const Range& range) {
  return std::string(range.what) + " (" + std::to_string(range.size) + " bytes at device+" +
         (on_device(range.address) ? std::to_string(range.address - state().begin) : "host " + std::to_string(range.address)) + ")";
}

std::pair<Allocation&, size_t> found(const Range& range, int on) {
  auto after = state().memory.upper_bound(range.address);
  if (after == state().memory.begin()) violation(shown(range) + " lies outside the memory reserved on the device");
  const auto& [base, allocation] = *--after;
  if (range.address + range.size > base + allocation.bytes.size())
    violation(shown(range) + " lies outside the memory reserved on the device, or in memory that was freed");
  if (allocation.device != on)
    violation(shown(range) + " is memory of device " + std::to_string(allocation.device) + ", used on device " + std::to_string(on));
  return {after->second, range.address - base};
}

// The stream, if it may be used now.
CUstream_st& used(cudaStream_t stream) {
  const auto it = state().streams.find(stream);
  if (it == state().streams.end()) violation("a stream that does not exist, or the default one, was used");
  return *it->second;
}

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

#define STANDIN_CALL()                                     \
  const std::lock_guard<std::recursive_mutex> lock(mutex()); \
  if (state().lost) return told(cudaErrorIllegalAddress)

}  // namespace

void violation(const std::string& what) {
  std::fprintf(stderr, "stand-in: %s\n", what.c_str());
  if (__sanitizer_print_stack_trace) __sanitizer_print_stack_trace();
  std::fflush(stderr);
  std::abort();
}

std::string setting(const std::string& key, const std::string& otherwise) {
  const char* all = std::getenv("ANYFLOW_STANDIN");
  std::string text = all ? std::string(",") + all + "," : "";
  const size_t at = text.find("," + key + "=");
  if (at == std::string::npos) return otherwise;
  const size_t begin = at + key.size() + 2;
  return text.substr(begin, text.find(',', begin) - begin);
}

int64_t number(const std::string& key, int64_t otherwise) { return std::atoll(setting(key, std::to_string(otherwise)).c_str()); }

std::recursive_mutex& mutex() {
  static auto* only = new std::recursive_mutex;
  return *only;
}

Counters& counters() {
  static auto* only = new Counters;
  return *only;
}

bool overlap(const Range& a, const Range& b) {
  return a.size && b.size && a.address < b.address + b.size && b.address < a.address + a.size;
}

int current_device() { return device; }
cudaError_t last_error() { return last; }
bool lost() { return state().lost; }
bool capturing(cudaStream_t stream) { return used(stream).capture != nullptr; }
int device_of(cudaStream_t stream) { return used(stream).device; }

bool pending(const ContextMark* context) {
  for (const auto& [stream, held] : state().streams) {
    for (const Work& work : held->pending) {
      if (work.context.get() == context) return true;
    }
  }
  return false;
}

void put(cudaStream_t stream, Work work, const char* what) {
  CUstream_st& to = used(stream);
  if (to.capture) {
    to.capture->nodes.push_back(std::move(work));
    return;
  }
  const auto clash = [&](const std::vector<Range>& mine, const std::vector<Range>& theirs) {
    for (const Range& a : mine) {
      for (const Range& b : theirs) {
        if (overlap(a, b)) violation(std::string(what) + ": " + shown(a) + " races with another stream's " + shown(b));
      }
    }
  };
  for (const auto& [other, held] : state().streams) {
    if (other == stream) continue;
    for (const Work& theirs : held->pending)
      clash(work.writes, theirs.reads), clash(work.writes, theirs.writes), clash(work.reads, theirs.writes);
  }
  to.pending.push_back(std::move(work));
}

uint8_t* reading(const Range& range, int on) {
  if (!range.size) return nullptr;
  const auto [allocation, offset] = found(range, on);
  const auto begin = allocation.known.begin() + static_cast<std::ptrdiff_t>(offset);
  if (!std::all_of(begin, begin + static_cast<std::ptrdiff_t>(range.size), [](uint8_t known) { return known; }))
    violation(shown(range) + " is read, and not all of it was written before");
  return allocation.bytes.data() + offset;
}

uint8_t* writing(const Range& range, int on) {
  if (!range.size) return nullptr;
  const auto [allocation, offset] = found(range, on);
  std::fill_n(allocation.known.begin() + static_cast<std::ptrdiff_t>(offset), range.size, 1);
  return allocation.bytes.data() + offset;
}

void spoil(const Range& range, int on) {
  if (!range.size) return;
  const auto [allocation, offset] = found(range, on);
  std::fill_n(allocation.known.begin() + static_cast<std::ptrdiff_t>(offset), range.size, 0);
  std::fill_n(allocation.bytes.begin() + static_cast<std::ptrdiff_t>(offset), range.size, 0xAA);
}

void check_reserved(const Range& range, int on) {
  if (range.size) found(range, on);
}

uintptr_t reserve(size_t size) {
  State& s = state();
  if (counters().bytes + static_cast<int64_t>(size) > number("memory", int64_t{1} << 32)) return 0;
  const uintptr_t address = s.next;
  s.next += (size + 2 * granule - 1) / granule * granule;  // and a gap
  if (s.next > s.begin + space) violation("the device's address space is used up");
  s.memory[address] = {device, std::vector<uint8_t>(size, 0xFF), std::vector<uint8_t>(size, 0)};
  Counters& c = counters();
  ++c.allocations, ++c.allocated, c.bytes += static_cast<int64_t>(size), c.most_bytes = std::max(c.most_bytes, c.bytes);
  return address;
}

void release(uintptr_t address) {
  State& s = state();
  const auto it = s.memory.find(address);
  if (it == s.memory.end()) violation("memory was freed that was freed before, or never reserved");
  const Range range{address, it->second.bytes.size(), "freed memory"};
  for (const auto& [stream, held] : s.streams) {
    for (const Work& work : held->pending) {
      for (const auto* ranges : {&work.reads, &work.writes}) {
        for (const Range& used : *ranges) {
          if (!s.lost && overlap(used, range)) violation(shown(range) + " still has work pending on it: " + shown(used));
        }
      }
    }
  }
  --counters().allocations, counters().bytes -= static_cast<int64_t>(range.size);
  s.memory.erase(it);
}

}  // namespace standin

using namespace standin;

extern "C" {

const char* standin_report(void) {
  static char text[512];
  const Counters& c = counters();
  std::snprintf(text, sizeof text,
                "{\"runtimes\": %lld, \"engines\": %lld, \"contexts\": %lld, \"streams\": %lld, \"graphs\": %lld, \"allocations\": "
                "%lld, \"bytes\": %lld, \"most_bytes\": %lld, \"contexts_made\": %lld, \"enqueued\": %lld, \"captured\": %lld, "
                "\"launched\": %lld, \"streams_made\": %lld, \"allocated\": %lld}",
                static_cast<long long>(c.runtimes), static_cast<long long>(c.engines), static_cast<long long>(c.contexts),
                static_cast<long long>(c.streams), static_cast<long long>(c.graphs), static_cast<long long>(c.allocations),
                static_cast<long long>(c.bytes), static_cast<long long>(c.most_bytes), static_cast<long long>(c.contexts_made),
                static_cast<long long>(c.enqueued), static_cast<long long>(c.captured), static_cast<long long>(c.launched),
                static_cast<long long>(c.streams_made), static_cast<long long>(c.allocated));
  return text;
}

// Devices and errors.

cudaError_t cudaGetDeviceCount(int* count) {
  STANDIN_CALL();
  if (number("devices", 1) == 0) return told(cudaErrorInsufficientDriver);
  *count = static_cast<int>(number("devices", 1));
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
  std::sscanf(setting("capability", "9.0").c_str(), "%d.%d", &properties->major, &properties->minor);
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorMemoryAllocation ? "out of memory" : "an error, in words"; }
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
