#include "json.hpp"

#include <nlohmann/json.hpp>

namespace af {
namespace {

using nlohmann::json;

const json& of(const void* node) { return *static_cast<const json*>(node); }

}  // namespace

Value Value::parsed(std::string_view text) {
  try {
    auto document = std::make_shared<const json>(json::parse(text.begin(), text.end()));
    const void* root = document.get();
    return {std::move(document), root, ""};
  } catch (const json::exception&) {
    throw Damage("", "it is not JSON");
  }
}

bool Value::is_null() const { return of(node_).is_null(); }
bool Value::is_text() const { return of(node_).is_string(); }
bool Value::is_object() const { return of(node_).is_object(); }
bool Value::is_list() const { return of(node_).is_array(); }
bool Value::is_flag() const { return of(node_).is_boolean(); }

std::string Value::text() const {
  if (!is_text()) throw Damage(place_, "Input should be a valid string");
  return of(node_).get<std::string>();
}

int64_t Value::integer() const {
  const json& node = of(node_);
  if (!node.is_number_integer()) throw Damage(place_, "Input should be a valid integer");
  if (node.is_number_unsigned() && node.get<uint64_t>() > INT64_MAX)
    throw Damage(place_, "Input should be an integer of 64 bits");
  return node.get<int64_t>();
}

double Value::number() const {
  if (!of(node_).is_number()) throw Damage(place_, "Input should be a valid number");
  return of(node_).get<double>();
}

bool Value::boolean() const {
  if (!of(node_).is_boolean()) throw Damage(place_, "Input should be a valid boolean");
  return of(node_).get<bool>();
}

std::vector<Value> Value::items() const {
  if (!is_list()) throw Damage(place_, "Input should be a valid list");
  std::vector<Value> found;
  for (const json& item : of(node_)) found.push_back(inner(&item, std::to_string(found.size())));
  return found;
}

std::vector<std::pair<std::string, Value>> Value::members() const {
  if (!is_object()) throw Damage(place_, "Input should be a valid dictionary");
  std::vector<std::pair<std::string, Value>> found;
  for (const auto& [key, item] : of(node_).items()) found.emplace_back(key, inner(&item, key));
  return found;
}

std::optional<Value> Value::find(const std::string& key) const {
  const json& node = of(node_);
  if (!node.is_object()) return std::nullopt;
  const auto found = node.find(key);
  if (found == node.end()) return std::nullopt;
  return inner(&*found, key);
}

Value Value::inner(const void* node, const std::string& key) const {
  return {document_, node, place_.empty() ? key : place_ + "." + key};
}

Record::Record(Value value) : value_(std::move(value)) {
  if (!value_.is_object()) throw Damage(value_.place(), "Input should be an object");
}

Value Record::required(const std::string& key) {
  if (const auto found = optional(key)) return *found;
  throw Damage(value_.place().empty() ? key : value_.place() + "." + key, "Field required");
}

std::optional<Value> Record::optional(const std::string& key, bool nullable) {
  known_.insert(key);
  auto found = value_.find(key);
  return found && nullable && found->is_null() ? std::nullopt : found;
}

std::string Record::word(const std::string& key, std::initializer_list<const char*> allowed) {
  const Value value = required(key);
  std::string expected;
  for (const char* word : allowed) {
    if (value.is_text() && value.text() == word) return word;
    expected += (expected.empty() ? "'" : ", '") + std::string(word) + "'";
  }
  throw Damage(value.place(), "Input should be " + expected);
}

void Record::done() const {
  for (const auto& [key, item] : value_.members()) {
    if (!known_.contains(key)) throw Damage(item.place(), "Extra inputs are not permitted");
  }
}

std::string json_object(const std::vector<std::pair<std::string, std::string>>& members) {
  std::string text = "{";
  for (const auto& [key, value] : members) text += (text.size() > 1 ? "," : "") + json(key).dump() + ":" + value;
  return text + "}";
}

}  // namespace af
