#include "error.hpp"

#include <charconv>
#include <cmath>
#include <mutex>

namespace af {
namespace {

std::mutex log_mutex;
anyflow_log_callback log_callback = nullptr;
void* log_user = nullptr;

template <typename T, typename Show>
std::string joined(std::span<const T> values, Show show) {
  std::string text;
  for (const T& value : values) text += (text.empty() ? "" : ", ") + show(value);
  return text;
}

}  // namespace

void log(anyflow_log_level level, const std::string& text) {
  anyflow_log_callback callback;
  void* user;
  {
    const std::lock_guard lock(log_mutex);
    callback = log_callback, user = log_user;
  }
  if (callback) callback(level, text.c_str(), user);
}

std::string shown(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char buffer[64];
  const double size = std::abs(value);
  const bool plain = size == 0 || (size >= 1e-4 && size < 1e16);
  const auto end =
      std::to_chars(buffer, buffer + sizeof buffer, value, plain ? std::chars_format::fixed : std::chars_format::scientific);
  std::string text(buffer, end.ptr);
  return plain && text.find('.') == std::string::npos ? text + ".0" : text;
}

std::string list(std::span<const double> values) { return "[" + joined(values, shown) + "]"; }

std::string list(std::span<const int64_t> values) {
  return "[" + joined(values, [](int64_t v) { return std::to_string(v); }) + "]";
}

std::string tuple(std::span<const int64_t> values) {
  const std::string text = joined(values, [](int64_t v) { return std::to_string(v); });
  return "(" + text + (values.size() == 1 ? ",)" : ")");
}

std::string grouped(int64_t value) {
  std::string text = std::to_string(value);
  for (int64_t at = static_cast<int64_t>(text.size()) - 3; at > (value < 0 ? 1 : 0); at -= 3)
    text.insert(static_cast<size_t>(at), ",");
  return text;
}

std::string megabytes(double bytes) {
  const auto tenths = static_cast<int64_t>(std::llround(bytes / 1e5));
  return grouped(tenths / 10) + "." + std::to_string(tenths % 10) + " MB";
}

std::string in_quotes(const std::string& text) {
  const char mark = text.find('\'') != std::string::npos && text.find('"') == std::string::npos ? '"' : '\'';
  std::string result(1, mark);
  for (const char c : text) {
    if (c == '\\' || c == mark) result += '\\';
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      char code[8];
      std::snprintf(code, sizeof code, "\\x%02x", static_cast<unsigned char>(c));
      result += code;
    } else {
      result += c;
    }
  }
  return result + mark;
}

}  // namespace af

extern "C" void anyflow_set_log(anyflow_log_callback callback, void* user) {
  const std::lock_guard lock(af::log_mutex);
  af::log_callback = callback, af::log_user = user;
}
