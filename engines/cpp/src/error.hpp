// The one exception of the library, and the words that messages are made of. It never crosses the C border (c_api.cpp).
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "anyflow/anyflow.h"

namespace af {

class Error : public std::runtime_error {
 public:
  Error(anyflow_code kind, const std::string& text) : std::runtime_error(text), code(kind) {}
  const anyflow_code code;
};

void log(anyflow_log_level level, const std::string& text);

// A number as Python prints it, so that both say the same: "1.0", "0.1", "1e-05".
std::string shown(double value);
// "[1, 2]" and "(1, 2)".
std::string list(std::span<const double> values);
std::string list(std::span<const int64_t> values);
std::string tuple(std::span<const int64_t> values);
// "1,234,567" and with one decimal "1,234.5".
std::string grouped(int64_t value);
std::string megabytes(double bytes);
// A text as Python's repr prints it: quoted, controls escaped.
std::string in_quotes(const std::string& text);

}  // namespace af
