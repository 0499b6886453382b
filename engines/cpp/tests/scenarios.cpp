#include "scenarios.hpp"

#include <dlfcn.h>

#include <thread>

using nlohmann::json;

namespace scenarios {
namespace {

anyflow::Stream stream_of(anyflow::Engine& engine, const json& request) {
  anyflow::StreamOptions options;
  options.chunk_plan = value_or<std::vector<int64_t>>(request, "chunks", {});
  options.window = value_or<int64_t>(request, "window", 0);
  return engine.stream(array_of<5>(request.at("noise")), array_of<3>(request.at("text")), options);
}

// A whole stream, whose chunks are each broken off once where `abort_after` says, and begun again.
json whole(anyflow::Engine& engine, const json& request) {
  auto stream = stream_of(engine, request);
  const int64_t abort_after = value_or<int64_t>(request, "abort_after", -1);
  json made = json::array();
  for (bool going = true; going;) {
    anyflow::Sampling sampling;
    sampling.schedule = anyflow::Schedule::uniform(value_or<int64_t>(request, "steps", 2), 5);
    int64_t asked = 0;
    sampling.abort = [&] { return asked++ == abort_after; };
    try {
      if (abort_after >= 0) stream.next(sampling), made.push_back("not broken off");
    } catch (const anyflow::Error& error) {
      if (error.code() != ANYFLOW_ABORTED) throw;
    }
    sampling.abort = nullptr;
    std::optional<anyflow::Chunk> chunk;
    try {
      chunk = stream.next(sampling);
    } catch (const anyflow::Error& error) {
      if (error.code() != ANYFLOW_OUT_OF_MEMORY) throw;
      chunk = stream.next(sampling);  // it may have been given back elsewhere: where not, it says so again
    }
    going = chunk.has_value() && chunk->index + 1 < static_cast<int64_t>(request.at("chunks").size());
    if (chunk) made.push_back(chunk->latents.data);
  }
  return made;
}

// One engine, several streams: one after the other, or each in a thread of its own.
json streams(const json& request) {
  auto engine = engine_of(request);
  const size_t count = value_or<size_t>(request, "count", 1);
  std::vector<json> made(count);
  std::vector<std::string> faults(count);
  const auto one = [&](size_t i) {
    try {
      made[i] = whole(engine, request);
    } catch (const std::exception& error) {
      faults[i] = error.what();
    }
  };
  json after = json::array();
  if (value_or(request, "threads_each", false)) {
    std::vector<std::thread> threads;
    for (size_t i = 0; i < count; ++i) threads.emplace_back(one, i);
    for (auto& thread : threads) thread.join();
  } else {
    for (size_t i = 0; i < count; ++i) one(i), after.push_back(report());
  }
  return {{"streams", made}, {"faults", faults}, {"reports", after}};
}

// Samples one after the other on one engine, which need not have one shape; what lives after each.
json samples(const json& request) {
  auto engine = engine_of(request);
  json made = json::array(), reports = json::array();
  for (const json& item : request.at("noises")) {
    anyflow::Sampling sampling;
    sampling.schedule = anyflow::Schedule::uniform(value_or<int64_t>(request, "steps", 2), 5);
    try {
      made.push_back(engine.sample(array_of<5>(item), array_of<3>(request.at("text")), sampling).data);
    } catch (const anyflow::Error& error) {
      made.push_back({{"error", error.what()}, {"code", error.code()}});
    }
    reports.push_back(report());
  }
  return {{"made", made}, {"reports", reports}};
}

// Two runs take turns; the engine's own handle is closed before, and the first is stepped by another thread.
json interleaved(const json& request) {
  auto engine = std::make_unique<anyflow::Engine>(engine_of(request));
  const auto text = array_of<3>(request.at("text"));
  auto one = engine->start(array_of<5>(request.at("noises")[0]), text);
  auto two = std::make_unique<anyflow::Run>(engine->start(array_of<5>(request.at("noises")[1]), text));
  engine.reset();
  const auto times = request.at("times").get<std::vector<float>>();
  json second;
  for (size_t i = 0; i + 1 < times.size(); ++i) {
    std::thread([&] { one.step({times[i]}, {times[i + 1]}); }).join();
    if (two) two->step({times[i]}, {times[i + 1]});
    if (i == 1) second = two->read().data, two.reset();
  }
  return {{"first", one.read().data}, {"second", second}};
}

// Two engines of one bundle; the first is closed while the second goes on.
json two_engines(const json& request) {
  auto first = std::make_unique<anyflow::Engine>(engine_of(request));
  auto second = engine_of(request);
  const auto noise = array_of<5>(request.at("noise"));
  const auto text = array_of<3>(request.at("text"));
  json made = json::array({first->sample(noise, text, {}).data});
  first.reset();
  made.push_back(second.sample(noise, text, {}).data);
  json wrong = request;
  wrong["engine"] = request.at("broken");
  try {
    engine_of(wrong);
  } catch (const anyflow::Error& error) {
    made.push_back(error.what());
  }
  return {{"made", made}};
}

}  // namespace

json report() {
  const auto found = reinterpret_cast<const char* (*)()>(dlsym(RTLD_DEFAULT, "standin_report"));
  return found ? json::parse(found()) : json();
}

std::optional<json> answered(const std::string& question, const json& request) {
  if (question == "streams") return streams(request);
  if (question == "samples") return samples(request);
  if (question == "interleaved") return interleaved(request);
  if (question == "two engines") return two_engines(request);
  if (question == "report") return report();
  return std::nullopt;
}

}  // namespace scenarios
