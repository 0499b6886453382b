// Questions of the program `conformance` about an engine over its life: several streams and samples on it, at once or one after
// the other, broken off and begun again, handles closed in every order.
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "anyflow/anyflow.hpp"

// What all questions read from a request.
template <typename T>
T value_or(const nlohmann::json& request, const char* key, T otherwise) {
  return request.contains(key) && !request[key].is_null() ? request[key].get<T>() : otherwise;
}

template <size_t Axes>
anyflow::Array<Axes> array_of(const nlohmann::json& value) {
  return {value["shape"].get<std::array<int64_t, Axes>>(), value["data"].get<std::vector<float>>()};
}

anyflow::Engine engine_of(const nlohmann::json& request);

namespace scenarios {

// What the acted machine says of itself (fakes/machine.hpp); null where there is none.
nlohmann::json report();
// Nothing where the question is none of these.
std::optional<nlohmann::json> answered(const std::string& question, const nlohmann::json& request);

}  // namespace scenarios
