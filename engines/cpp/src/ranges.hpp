// Which shapes a bundle accepts; see anyflow_deploy/shape_ranges.py.
#pragma once

#include <array>
#include <map>
#include <optional>
#include <span>
#include <string>

#include "json.hpp"

namespace af {

using LatentShape = std::array<int64_t, 5>;
using TextShape = std::array<int64_t, 3>;

struct Range {
  int64_t minimum;
  std::optional<int64_t> maximum;
  int64_t multiple;

  bool holds(int64_t value) const { return minimum <= value && (!maximum || value <= *maximum) && value % multiple == 0; }
  int64_t nearest(int64_t value) const;
  std::string shown() const;
};

class Ranges {
 public:
  // Throws Damage.
  static Ranges read(const Value& value);
  // nullptr: no such axis.
  const Range* find(const std::string& axis) const;
  // Throws Error naming the axis and the nearest size that fits.
  void check(const LatentShape& latents, const TextShape& text) const;

 private:
  std::map<std::string, Range> axes_;
};

}  // namespace af
