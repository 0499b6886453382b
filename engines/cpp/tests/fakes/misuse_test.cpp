// Breaks each of the stand-in's rules once: `misuse_test` lists them, `misuse_test NAME` commits one and must not come back in
// peace.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;

class Logger final : public ILogger {
  void log(Severity, AsciiChar const*) noexcept override {}
};

void* device(size_t size = 4096) {
  void* address = nullptr;
  cudaMalloc(&address, size);
  return address;
}

cudaStream_t stream() {
  cudaStream_t made = nullptr;
  cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
  return made;
}

char host[4096];

void up(void* to, cudaStream_t on, size_t size = 4096) { cudaMemcpyAsync(to, host, size, cudaMemcpyHostToDevice, on); }

// Text in, its keys out, ready to be run.
struct Ready {
  Logger logger;
  std::unique_ptr<IRuntime> runtime;
  std::unique_ptr<ICudaEngine> engine;
  std::unique_ptr<IExecutionContext> context;
  cudaStream_t on = stream();
  char *in = static_cast<char*>(device()), *out = static_cast<char*>(device()), *memory = static_cast<char*>(device());

  Ready() {
    const std::string version =
        std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) + "." + std::to_string(NV_TENSORRT_PATCH);
    const std::string plan = "standin-plan\nversion " + version +
                             "\ncapability " STANDIN_CAPABILITY
                             "\ngraph text\ninput text float32 1 -1 4\noutput text_key.0 float16 1 -1 2 4\n"
                             "profile\nrange text 1 1 4 1 9 4 1 9 4\nend\n";
    runtime.reset(createInferRuntime(logger));
    engine.reset(runtime->deserializeCudaEngine(plan.data(), plan.size()));
    context.reset(engine->createExecutionContext(ExecutionContextAllocationStrategy::kUSER_MANAGED));
    up(in, on);
    context->setOptimizationProfileAsync(0, on);
    shape(3);
    context->setTensorAddress("text", in), context->setTensorAddress("text_key.0", out);
    context->setDeviceMemoryV2(memory, 4096);
  }
  void shape(int64_t length) {
    context->setInputShape("text", Dims3(1, length, 4));
    context->updateDeviceMemorySizeForShapes();
  }
  void run() { context->enqueueV3(on); }
  void wait() { cudaStreamSynchronize(on); }
  cudaGraphExec_t captured() {
    run(), wait();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    cudaStreamBeginCapture(on, cudaStreamCaptureModeThreadLocal);
    run();
    cudaStreamEndCapture(on, &graph);
    cudaGraphInstantiateWithFlags(&executable, graph, 0);
    return executable;
  }
};

const std::map<std::string, std::function<void()>> offences = {
    {"free-twice",
     [] {
       void* a = device();
       cudaFree(a), cudaFree(a);
     }},
    {"free-within", [] { cudaFree(static_cast<char*>(device()) + 256); }},
    {"free-under-work",
     [] {
       void* a = device();
       up(a, stream()), cudaFree(a);
     }},
    {"copy-past-the-end", [] { up(device(100), stream(), 101); }},
    {"copy-of-unknown",
     [] {
       auto s = stream();
       cudaMemcpyAsync(host, device(), 1, cudaMemcpyDeviceToHost, s), cudaStreamSynchronize(s);
     }},
    {"copy-over-itself",
     [] {
       char* a = static_cast<char*>(device());
       cudaMemcpyAsync(a + 1, a, 2, cudaMemcpyDeviceToDevice, stream());
     }},
    {"copy-of-wrong-kind", [] { cudaMemcpyAsync(device(), host, 1, cudaMemcpyDeviceToHost, stream()); }},
    {"default-stream", [] { up(device(), nullptr); }},
    {"stream-with-work",
     [] {
       auto s = stream();
       up(device(), s), cudaStreamDestroy(s);
     }},
    {"streams-race",
     [] {
       void* a = device();
       up(a, stream()), up(a, stream());
     }},
    {"another-device",
     [] {
       void* a = device();
       cudaSetDevice(1), up(a, stream());
     }},
    {"wait-in-capture",
     [] {
       auto s = stream();
       cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal), cudaStreamSynchronize(s);
     }},
    {"malloc-in-capture", [] { cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal), device(); }},
    {"host-copy-in-capture",
     [] {
       auto s = stream();
       cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal), up(device(), s);
     }},
    {"something-left", [] { device(); }},
    {"two-loggers",
     [] {
       Logger a, b;
       std::unique_ptr<IRuntime> one(createInferRuntime(a)), two(createInferRuntime(b));
     }},
    {"runtime-before-engine",
     [] {
       Ready r;
       r.context.reset(), r.runtime.reset();
     }},
    {"engine-before-context",
     [] {
       Ready r;
       r.engine.reset();
     }},
    {"context-under-work",
     [] {
       Ready r;
       r.run(), r.context.reset();
     }},
    {"address-not-aligned",
     [] {
       Ready r;
       r.context->setTensorAddress("text", r.in + 128);
     }},
    {"memory-not-asked-for",
     [] {
       Ready r;
       r.context->setInputShape("text", Dims3(1, 4, 4)), r.run();
     }},
    {"memory-too-small",
     [] {
       Ready r;
       r.context->setDeviceMemoryV2(r.memory, 999), r.run();
     }},
    {"memory-that-is-not-there",
     [] {
       Ready r;
       r.context->setDeviceMemoryV2(r.memory, 9999), r.run();
     }},
    {"output-over-input",
     [] {
       Ready r;
       r.context->setTensorAddress("text_key.0", r.in), r.run();
     }},
    {"output-in-activations",
     [] {
       Ready r;
       r.context->setTensorAddress("text_key.0", r.memory + 256), r.run();
     }},
    {"output-past-the-end",
     [] {
       Ready r;
       r.context->setTensorAddress("text_key.0", r.out + 4096 - 256 + 256), r.run();
     }},
    {"input-was-freed",
     [] {
       Ready r;
       r.wait(), cudaFree(r.in), r.run();
     }},
    {"input-unknown",
     [] {
       Ready r;
       r.context->setTensorAddress("text", device()), r.run(), r.wait();
     }},
    {"activations-of-two-streams",
     [] {
       Ready r, s;
       s.context->setDeviceMemoryV2(r.memory, 4096), r.run(), s.run();
     }},
    {"profile-of-another-stream",
     [] {
       Ready r;
       r.on = stream(), r.run();
     }},
    {"error-left-behind",
     [] {
       Ready r;
       cudaSetDevice(99), r.run();
     }},
    {"run-on-another-device",
     [] {
       Ready r;
       cudaSetDevice(1), r.run();
     }},
    {"change-after-capture",
     [] {
       Ready r;
       r.captured(), r.shape(4);
     }},
    {"run-after-capture",
     [] {
       Ready r;
       r.captured(), r.run();
     }},
    {"graph-without-context",
     [] {
       Ready r;
       auto g = r.captured();
       r.context.reset(), cudaGraphLaunch(g, r.on);
     }},
    {"graph-on-freed-memory",
     [] {
       Ready r;
       auto g = r.captured();
       cudaFree(r.out), cudaGraphLaunch(g, r.on), r.wait();
     }},
};

}  // namespace

int main(int count, char** words) {
  if (count < 2) {
    for (const auto& [name, commit] : offences) std::puts(name.c_str());
    return 0;
  }
  offences.at(words[1])();
  return 0;
}
