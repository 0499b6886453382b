#include "ranges.hpp"

#include <cmath>

#include "error.hpp"

namespace af {
namespace {

constexpr std::array<const char*, 5> axis_names = {"batch", "frames", "height", "width", "text"};

Range read_range(const Value& value) {
  Record record(value);
  Range range{};
  range.minimum = record.integer("minimum");
  const Value maximum = record.required("maximum");
  if (!maximum.is_null()) range.maximum = maximum.integer();
  range.multiple = record.integer("multiple");
  record.done();
  return range;
}

// A maximum of 0 is not null here as in Python, but it is below every minimum and so refused all the same.
void check_range(const Range& range, const std::string& place) {
  if (range.minimum < 1 || range.multiple < 1) throw Damage(place, "a range starts below 1; sizes are positive whole numbers");
  if (range.maximum && *range.maximum < range.minimum) throw Damage(place, "the range " + range.shown() + " is empty");
  if (range.minimum % range.multiple || range.maximum.value_or(range.multiple) % range.multiple) {
    throw Damage(place, "range " + range.shown() + ": both ends have to be multiples of " + std::to_string(range.multiple));
  }
}

}  // namespace

int64_t Range::nearest(int64_t value) const {
  const auto whole = static_cast<int64_t>(std::nearbyint(static_cast<double>(value) / static_cast<double>(multiple)));
  const int64_t floor = std::max(minimum, whole * multiple);
  return maximum ? std::min(floor, *maximum) : floor;
}

std::string Range::shown() const {
  if (maximum == minimum) return std::to_string(minimum);
  const std::string span = std::to_string(minimum) + " to " + (maximum ? std::to_string(*maximum) : "any");
  return multiple == 1 ? span : span + " in multiples of " + std::to_string(multiple);
}

Ranges Ranges::read(const Value& value) {
  Ranges ranges;
  for (const auto& [axis, item] : value.members()) ranges.axes_.emplace(axis, read_range(item));
  for (const char* axis : axis_names) {
    if (!ranges.find(axis)) throw Damage(value.place(), "the range of " + std::string(axis) + " is missing");
  }
  if (ranges.axes_.size() != axis_names.size()) throw Damage(value.place(), "it holds a range of an axis that is not known");
  for (const auto& [axis, range] : ranges.axes_) check_range(range, value.place() + "." + axis);
  return ranges;
}

const Range* Ranges::find(const std::string& axis) const {
  const auto found = axes_.find(axis);
  return found == axes_.end() ? nullptr : &found->second;
}

void Ranges::check(const LatentShape& latents, const TextShape& text) const {
  if (text[0] != latents[0]) {
    throw Error(ANYFLOW_SHAPE, "latents have batch " + std::to_string(latents[0]) + " and text has batch " +
                                   std::to_string(text[0]) + ": they must be equal.");
  }
  const std::array<int64_t, 5> sizes = {latents[0], latents[1], latents[3], latents[4], text[1]};
  for (size_t i = 0; i < sizes.size(); ++i) {
    const std::string axis = axis_names[i];
    const Range& allowed = *find(axis);
    if (!allowed.holds(sizes[i])) {
      throw Error(ANYFLOW_SHAPE, axis + " is " + std::to_string(sizes[i]) + ", but this bundle declares " + axis + " " +
                                     allowed.shown() + " (latent units); the nearest that fits is " +
                                     std::to_string(allowed.nearest(sizes[i])) +
                                     ". Change the input, or export with a wider range.");
    }
  }
}

}  // namespace af
