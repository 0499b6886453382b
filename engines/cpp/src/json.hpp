// JSON read suspiciously: strict types, no unknown keys, and errors that name the place. The parser is nlohmann's; only
// json.cpp includes it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace af {

// What is wrong with a document, and where ("files.weights.safetensors.bytes").
class Damage : public std::runtime_error {
 public:
  Damage(std::string where, const std::string& reason) : std::runtime_error(reason), place(std::move(where)) {}
  const std::string place;
};

// A value somewhere in a document; it keeps the document.
class Value {
 public:
  // Throws Damage.
  static Value parsed(std::string_view text);

  const std::string& place() const { return place_; }
  bool is_null() const;
  bool is_text() const;
  bool is_object() const;
  bool is_list() const;
  bool is_flag() const;

  // Each throws Damage where the value is of another type; a whole number is a number, true is neither.
  std::string text() const;
  int64_t integer() const;
  double number() const;
  bool boolean() const;
  std::vector<Value> items() const;
  std::vector<std::pair<std::string, Value>> members() const;
  std::optional<Value> find(const std::string& key) const;

 private:
  Value(std::shared_ptr<const void> document, const void* node, std::string place)
      : document_(std::move(document)), node_(node), place_(std::move(place)) {}
  Value inner(const void* node, const std::string& key) const;

  std::shared_ptr<const void> document_;
  const void* node_;
  std::string place_;
};

// An object whose keys are all known: each is asked for once, and `done` refuses what is left.
class Record {
 public:
  explicit Record(Value value);

  Value required(const std::string& key);
  // Not there, or (with `nullable`) null.
  std::optional<Value> optional(const std::string& key, bool nullable = false);
  std::string text(const std::string& key) { return required(key).text(); }
  int64_t integer(const std::string& key) { return required(key).integer(); }
  double number(const std::string& key) { return required(key).number(); }
  // One of some words.
  std::string word(const std::string& key, std::initializer_list<const char*> allowed);
  void done() const;

 private:
  Value value_;
  std::set<std::string> known_;
};

// An object of values that are JSON already.
std::string json_object(const std::vector<std::pair<std::string, std::string>>& members);

}  // namespace af
