// The stand-in's device: memory that knows what was written, streams that wait, and the end of the process.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "state.hpp"

extern "C" void __sanitizer_print_stack_trace() __attribute__((weak));

namespace standin {

thread_local int device = 0;
thread_local cudaError_t last = cudaSuccess;

namespace {

constexpr size_t space = size_t{1} << 38, granule = 512;

void at_exit();

void at_exit() {
  Counters& c = counters();
  if (c.runtimes || c.engines || c.contexts || c.streams || c.graphs || c.allocations || c.configurations)
    violation(std::string("the process ends and these are left: ") + standin_report());
}

std::pair<Allocation&, size_t> found(const Range& range, int on) {
  auto after = state().memory.upper_bound(range.address);
  if (after == state().memory.begin()) violation(shown(range) + " lies outside the memory reserved on the device");
  const auto& [base, allocation] = *--after;
  if (range.address + range.size > base + allocation.bytes.size())
    violation(shown(range) + " lies outside the memory reserved on the device, or in memory that was freed");
  if (allocation.device != on)
    violation(shown(range) + " is memory of device " + std::to_string(allocation.device) + ", used on device " +
              std::to_string(on));
  return {after->second, range.address - base};
}

}  // namespace

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

bool on_device(uintptr_t address) { return address >= state().begin && address < state().begin + space; }

std::string shown(const Range& range) {
  return std::string(range.what) + " (" + std::to_string(range.size) + " bytes at device+" +
         (on_device(range.address) ? std::to_string(range.address - state().begin) : "host " + std::to_string(range.address)) +
         ")";
}

CUstream_st& used(cudaStream_t stream) {
  const auto it = state().streams.find(stream);
  if (it == state().streams.end()) violation("a stream that does not exist, or the default one, was used");
  return *it->second;
}

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
