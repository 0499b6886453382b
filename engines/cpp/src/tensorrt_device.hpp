// One CUDA device: memory, streams, captured graphs; see engines/tensorrt/cuda.py. Not run on a GPU yet (docs/how-to/cpp.md).
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string>

#include "bundle.hpp"

namespace af::trt {

inline constexpr size_t alignment = 256;  // bytes that TensorRT wants an address to be a multiple of

// Throws Error where CUDA's answer is not success.
void check_cuda(cudaError_t code, const char* doing);

class Gpu {
 public:
  explicit Gpu(int index);
  // Make it the calling thread's device; every thread starts on device 0.
  void use() const;
  const std::string& name() const { return name_; }
  int capability_major() const { return major_; }
  int capability_minor() const { return minor_; }
  Device record() const;

 private:
  int index_, major_ = 0, minor_ = 0;
  std::string name_;
};

// Device memory, not initialized.
class Buffer {
 public:
  explicit Buffer(size_t size);
  ~Buffer() { cudaFree(address_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* at(size_t offset = 0) const { return static_cast<char*>(address_) + offset; }
  size_t size() const { return size_; }

 private:
  void* address_ = nullptr;
  size_t size_;
};
using Held = std::shared_ptr<Buffer>;

// Work that was captured, to be done again by one call.
class Captured {
 public:
  explicit Captured(cudaGraphExec_t executable) : executable_(executable) {}
  ~Captured() { cudaGraphExecDestroy(executable_); }
  Captured(const Captured&) = delete;
  Captured& operator=(const Captured&) = delete;
  void launch(cudaStream_t stream) const { check_cuda(cudaGraphLaunch(executable_, stream), "launch a CUDA graph"); }

 private:
  cudaGraphExec_t executable_;
};

// A CUDA stream: what is put on it happens in order, some time later.
class Queue {
 public:
  Queue();
  ~Queue() { cudaStreamDestroy(stream_); }
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;
  cudaStream_t stream() const { return stream_; }
  // The host memory has to live until `wait`.
  void upload(void* to, const void* from, size_t size);
  void download(void* to, const void* from, size_t size);
  // Within the device; the places may overlap.
  void copy(char* to, const char* from, size_t size);
  void wait();
  // Wait, whatever comes of it: where an error is on its way already, or nobody can be told.
  void settle() noexcept;
  // What `work` puts on the stream, recorded and not done.
  std::unique_ptr<Captured> captured(const std::function<void()>& work);

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace af::trt
