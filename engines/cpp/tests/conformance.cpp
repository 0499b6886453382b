// Answers questions about the library, one JSON document a line, so that tests/integration/test_cpp.py can put the same ones to Python.
// Everything goes through the public header.
#include <iostream>
#include <nlohmann/json.hpp>
#include <thread>

#include "anyflow/anyflow.hpp"
#include "bundle.hpp"
#include "processor.hpp"
#include "scenarios.hpp"
#include "sha256.hpp"
#include "toy_backend.hpp"

using nlohmann::json;

namespace {

anyflow::Bundle opened(const json& request) {
  anyflow_bundle_params params = ANYFLOW_INIT(anyflow_bundle_params);
  params.skip_hashes = value_or(request, "skip_hashes", false);
  return anyflow::Bundle(request.at("bundle").get<std::string>(), &params);
}

anyflow::Schedule schedule_of(const json& request) {
  const std::string kind = request.at("kind");
  if (kind == "uniform") return anyflow::Schedule::uniform(request.at("steps"), request.at("shift"));
  const auto values = request.at("values").get<std::vector<double>>();
  return kind == "sigmas" ? anyflow::Schedule::from_sigmas(values, request.at("shift"))
                          : anyflow::Schedule::from_timesteps(values);
}

// How to sample, and what was seen on the way.
struct Watched {
  anyflow::Sampling sampling;
  json steps = json::array(), outcomes = json::array();
  int asked = 0;

  Watched(const json& request, const std::optional<anyflow::Pace>& pace) {
    if (request.contains("schedule")) sampling.schedule = schedule_of(request["schedule"]);
    if (request.contains("deadline")) {
      const json& given = request["deadline"];
      anyflow::Deadline deadline;
      deadline.seconds = given.at("seconds"), deadline.shift = value_or(given, "shift", 5.0),
      deadline.most = value_or<int64_t>(given, "most", 50);
      deadline.pace = pace;
      deadline.clock = [] { return toy::state().now; };
      const int enough = value_or(given, "enough_after", -1);
      if (enough >= 0) deadline.enough = [this, enough] { return asked++ >= enough; };
      sampling.deadline = deadline;
    }
    const int thrown = value_or(request, "throw_after", -1);
    sampling.on_step = [this, thrown](const anyflow::Step& step) {
      if (static_cast<int>(steps.size()) == thrown) throw std::domain_error("thrown by a callback");
      steps.push_back({step.index(), step.steps(), step.t(), step.r(), step.read().data.at(0)});
    };
    sampling.on_end = [this](const anyflow_outcome& o) { outcomes.push_back({o.steps, o.draft != 0, o.seconds, o.deadline}); };
    const int abort = value_or(request, "abort_after", -1);
    if (abort >= 0) sampling.abort = [this, abort] { return static_cast<int>(steps.size()) >= abort; };
  }
  Watched(const Watched&) = delete;
};

json sampled(const json& request) {
  toy::state() = {};
  toy::state().costs = value_or<std::vector<double>>(request, "costs", {});
  auto engine = engine_of(request);
  const auto noise = array_of<5>(request.at("noise"));
  const auto text = array_of<3>(request.at("text"));
  const anyflow::Pace pace;
  json runs = json::array();
  for (int i = 0; i < value_or(request, "runs", 1); ++i) {
    Watched watched(request, pace);
    const auto clean = engine.sample(noise, text, watched.sampling);
    runs.push_back({{"latents", clean.data}, {"steps", watched.steps}, {"outcomes", watched.outcomes}});
  }
  return {{"runs", runs}};
}

json streamed(const json& request) {
  toy::state() = {};
  toy::state().costs = value_or<std::vector<double>>(request, "costs", {});
  auto engine = engine_of(request);
  anyflow::StreamOptions options;
  options.chunk_plan = value_or<std::vector<int64_t>>(request, "chunks", {});
  options.window = value_or<int64_t>(request, "window", 0);
  if (request.contains("context") && !request["context"].is_null()) options.context = array_of<5>(request["context"]);
  auto stream = engine.stream(array_of<5>(request.at("noise")), array_of<3>(request.at("text")), options);
  const anyflow::Pace pace;
  Watched watched(request, pace);
  json chunks = json::array();
  while (auto chunk = stream.next(watched.sampling)) {
    chunks.push_back({{"index", chunk->index},
                      {"first_frame", chunk->first_frame},
                      {"given", chunk->given},
                      {"latents", chunk->latents.data}});
  }
  return {{"chunks", chunks}, {"steps", watched.steps}, {"outcomes", watched.outcomes}, {"calls", toy::state().calls}};
}

json planned(const json& request) {
  const auto bundle = opened(request);
  const auto chunks = value_or<std::vector<int64_t>>(request, "chunks", {});
  anyflow_stream_params params = ANYFLOW_INIT(anyflow_stream_params);
  if (!chunks.empty()) params.chunk_plan = chunks.data(), params.chunk_count = chunks.size();
  params.window = value_or<int64_t>(request, "window", 0);
  anyflow_cache_size size = ANYFLOW_INIT(anyflow_cache_size);
  anyflow::check(anyflow_cache_plan(bundle.get(), &params, request.at("height"), request.at("width"), request.at("text"), &size));
  return {{"frames", size.frames}, {"capacity", size.capacity}, {"bytes", size.bytes}, {"encoded_tokens", size.encoded_tokens}};
}

json velocity(const json& request) {
  auto run = engine_of(request).start(array_of<5>(request.at("noise")), array_of<3>(request.at("text")));
  return {{"latents", run.velocity(request.at("t").get<std::vector<float>>(), request.at("r").get<std::vector<float>>()).data}};
}

// Several threads at once on one engine, each with a video of its own.
json together(const json& request) {
  auto engine = engine_of(request);
  const auto text = array_of<3>(request.at("text"));
  const auto seeds = request.at("seeds").get<std::vector<uint64_t>>();
  std::vector<std::vector<float>> made(seeds.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < seeds.size(); ++i) {
    threads.emplace_back([&, i] {
      const auto noise = anyflow::noise(request.at("shape").get<std::array<int64_t, 5>>(), seeds[i]);
      made[i] = engine.sample(noise, text, anyflow::Schedule::uniform(4)).data;
    });
  }
  for (auto& thread : threads) thread.join();
  return {{"made", made}};
}

json information(const json& request) {
  const auto bundle = opened(request);
  const auto info = bundle.info();
  json ranges;
  for (const char* axis : {"batch", "frames", "height", "width", "text"}) {
    const auto range = bundle.range(axis);
    ranges[axis] = {range.minimum, range.maximum, range.multiple};
  }
  return {{"kind", info.kind},         {"digest", info.digest}, {"precision", info.precision},
          {"channels", info.channels}, {"shift", info.shift},   {"size", {info.frames, info.height, info.width}},
          {"ranges", ranges}};
}

json noise(const json& request) {
  std::vector<float> values(request.at("count").get<size_t>());
  anyflow::check(anyflow_noise(request.at("seed").get<uint64_t>(), values.data(), values.size()));
  return {{"values", values}};
}

json answered(const json& request) {
  const std::string question = request.at("question");
  if (question == "schedule") return {{"timesteps", schedule_of(request).timesteps()}};
  if (question == "sample") return sampled(request);
  if (question == "stream") return streamed(request);
  if (question == "together") return together(request);
  if (question == "plan") return planned(request);
  if (question == "velocity") return velocity(request);
  if (question == "bundle") return information(request);
  if (question == "noise") return noise(request);
  if (question == "description") return {{"text", engine_of(request).description()}};
  if (question == "hash") return {{"text", af::sha256_of(request.at("text").get<std::string>())}};
  if (question == "instructions")
    return {{"text", af::instructions(request.at("level"), request.at("cpuinfo"))}, {"machine", af::machine()}};
  if (auto answer = scenarios::answered(question, request)) return *answer;
  throw std::runtime_error("unknown question");
}

}  // namespace

anyflow::Engine engine_of(const json& request) {
  anyflow::EngineOptions options;
  options.backend = value_or<std::string>(request, "backend", "toy");
  options.engine = value_or<std::string>(request, "engine", "");
  options.provider = value_or<std::string>(request, "provider", "");
  options.device = value_or(request, "device", 0);
  options.cuda_graphs = value_or(request, "cuda_graphs", true);
  options.skip_hashes = value_or(request, "skip_engine_hashes", false);
  options.threads = value_or(request, "threads", 0);
  return anyflow::Engine(opened(request), options);
}

int main() {
  toy::toy_backend_install();
  for (std::string line; std::getline(std::cin, line);) {
    json answer;
    try {
      answer = answered(json::parse(line));
    } catch (const anyflow::Error& error) {
      answer = {{"error", error.what()}, {"code", error.code()}};
    } catch (const std::domain_error& error) {
      answer = {{"thrown", error.what()}};
    }
    std::cout << answer.dump() << std::endl;
  }
}
