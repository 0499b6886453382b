#include "tensorrt_device.hpp"

#include <algorithm>

#include "error.hpp"
#include "tensorrt_library.hpp"

namespace af::trt {
namespace {

// "12.9" of CUDA's 12090.
std::string cuda_version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// CUDA says "insufficient" of a driver that is not there, too.
Error driver_error(cudaError_t code) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);  // 0: there is none
  cudaRuntimeGetVersion(&runtime);
  cudaGetLastError();
  const std::string name = std::string(" (") + cudaGetErrorName(code) + ").";
  if (!driver) {
    return {ANYFLOW_BACKEND, "no NVIDIA driver was found on this machine (libcuda.so.1), and " + title() +
                                 " needs one. Install it; nvidia-smi shows whether it works. A container sees it when it is "
                                 "started with --gpus all" +
                                 name};
  }
  return {ANYFLOW_BACKEND, "the NVIDIA driver of this machine is for CUDA " + cuda_version(driver) +
                               ", and this library runs on CUDA " + cuda_version(runtime) +
                               ". Update the driver; nvidia-smi shows which one there is" + name};
}

}  // namespace

void check_cuda(cudaError_t code, const char* doing) {
  if (code != cudaSuccess) {
    cudaGetLastError();  // it is told here; what runs next is not to find it
    throw Error(ANYFLOW_BACKEND,
                std::string("CUDA could not ") + doing + ": " + cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ").");
  }
}

Gpu::Gpu(int index) : index_(index) {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code == cudaErrorInsufficientDriver) throw driver_error(code);
  check_cuda(code, "find a GPU");
  if (index >= count) {
    throw Error(ANYFLOW_BACKEND, "there is no CUDA device " + std::to_string(index) + ": this machine has " +
                                     std::to_string(count) + ", counted from 0.");
  }
  use();
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, index), "read the GPU's properties");
  name_ = properties.name, major_ = properties.major, minor_ = properties.minor;
}

void Gpu::use() const { check_cuda(cudaSetDevice(index_), "use the device"); }

Device Gpu::record() const { return {"cuda", name_, std::to_string(major_) + "." + std::to_string(minor_)}; }

Buffer::Buffer(size_t size) : size_(size) {
  const cudaError_t code = cudaMalloc(&address_, std::max(size, alignment));
  if (code == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t left = 0, total = 0;
    check_cuda(cudaMemGetInfo(&left, &total), "ask for the free memory");
    throw Error(ANYFLOW_OUT_OF_MEMORY,
                "the GPU has no " + megabytes(static_cast<double>(size)) + " left: " + megabytes(static_cast<double>(left)) +
                    " of " + megabytes(static_cast<double>(total)) +
                    " are free. Close what else uses the GPU, make smaller or shorter videos, or build with --weight-streaming (not on a Jetson).");
  }
  check_cuda(code, "reserve memory");
}

Queue::Queue() { check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "make a stream"); }

void Queue::upload(void* to, const void* from, size_t size) {
  if (size) check_cuda(cudaMemcpyAsync(to, from, size, cudaMemcpyHostToDevice, stream_), "copy to the GPU");
}

void Queue::download(void* to, const void* from, size_t size) {
  if (size) check_cuda(cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToHost, stream_), "copy from the GPU");
}

// CUDA does not define copies that overlap, so those go piece by piece.
void Queue::copy(char* to, const char* from, size_t size) {
  if (!size || to == from) return;
  const bool down = to < from;
  const auto gap = static_cast<size_t>(down ? from - to : to - from);
  const size_t piece = std::min(size, gap);
  const size_t pieces = (size + piece - 1) / piece;
  for (size_t i = 0; i < pieces; ++i) {
    const size_t offset = (down ? i : pieces - 1 - i) * piece;
    check_cuda(cudaMemcpyAsync(to + offset, from + offset, std::min(piece, size - offset), cudaMemcpyDeviceToDevice, stream_),
               "copy on the GPU");
  }
}

void Queue::wait() { check_cuda(cudaStreamSynchronize(stream_), "finish the work on the GPU"); }

void Queue::settle() noexcept {
  if (cudaStreamSynchronize(stream_) != cudaSuccess) cudaGetLastError();
}

std::unique_ptr<Captured> Queue::captured(const std::function<void()>& work) {
  check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
  cudaGraph_t graph = nullptr;
  try {
    work();
  } catch (...) {
    cudaStreamEndCapture(stream_, &graph);  // leaves the stream usable; its own error is a consequence
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  check_cuda(cudaStreamEndCapture(stream_, &graph), "capture a CUDA graph");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t code = cudaGraphInstantiateWithFlags(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check_cuda(code, "instantiate a CUDA graph");
  return std::make_unique<Captured>(executable);
}

}  // namespace af::trt
