#include "cache_plan.hpp"

#include <algorithm>

#include "error.hpp"

namespace af {
namespace {

// The sum, or one more than `limit` where it is larger: nothing here may overflow.
int64_t sum_up_to(const std::vector<int64_t>& values, int64_t limit) {
  int64_t sum = 0;
  for (const int64_t value : values) {
    if (value > limit - sum) return limit + 1;
    sum += value;
  }
  return sum;
}

}  // namespace

CachePlan CachePlan::make(const Architecture& a, std::vector<int64_t> chunks, int64_t height, int64_t width,
                          std::optional<int64_t> window, int64_t text_tokens) {
  if (!a.causal)
    throw Error(ANYFLOW_INVALID, "this is a bidirectional model; streams need a causal one (far-…). Use anyflow_sample.");
  if (chunks.empty()) chunks = a.chunk_partition;
  if (chunks.empty() || std::any_of(chunks.begin(), chunks.end(), [](int64_t n) { return n < 1; })) {
    throw Error(ANYFLOW_INVALID, "chunk plan " + list(std::span<const int64_t>(chunks)) +
                                     ": allowed are one or more positive whole numbers of latent frames.");
  }
  if (sum_up_to(chunks, a.rope_frames) > a.rope_frames) {
    throw Error(ANYFLOW_INVALID, "the chunk plan has more latent frames than the rotary table, which ends at " +
                                     std::to_string(a.rope_frames) + ".");
  }
  if (window && *window < 1) {
    throw Error(ANYFLOW_INVALID,
                "window is " + std::to_string(*window) + "; allowed are whole numbers from 1, or 0 to keep every chunk.");
  }
  const int64_t patch = a.patch[1], coarse = a.compressed_patch[1];
  if (height % patch || width % patch || height < coarse || width < coarse || height > patch * a.rope_frames ||
      width > patch * a.rope_frames) {
    throw Error(ANYFLOW_SHAPE, "latents of " + std::to_string(height) + " x " + std::to_string(width) +
                                   ": a causal model takes multiples of " + std::to_string(patch) + ", from " +
                                   std::to_string(coarse) + " to " + std::to_string(patch * a.rope_frames) + ".");
  }
  if (text_tokens < 1)
    throw Error(ANYFLOW_SHAPE, "text has " + std::to_string(text_tokens) + " tokens; allowed are whole numbers from 1.");
  return {std::move(chunks),
          a.full_chunk_limit - 1,
          window,
          (height / patch) * (width / patch),
          (height / coarse) * (width / coarse),
          text_tokens,
          a.layers,
          a.heads,
          a.head_channels};
}

int64_t CachePlan::first_frame(int64_t chunk) const {
  int64_t frames = 0;
  for (int64_t c = 0; c < chunk; ++c) frames += chunks[static_cast<size_t>(c)];
  return frames;
}

std::vector<int64_t> CachePlan::kept(int64_t chunk) const {
  const int64_t old = std::max<int64_t>(0, chunk - recent);
  std::vector<int64_t> all;
  for (int64_t c = 0; c < old; ++c) {
    if (!window || old <= 1 + *window || c == 0 || c >= old - *window) all.push_back(c);
  }
  return all;
}

int64_t CachePlan::cached_tokens(int64_t chunk) const {
  int64_t tokens = full_tokens * (first_frame(chunk) - first_frame(std::max<int64_t>(0, chunk - recent)));
  for (const int64_t c : kept(chunk)) tokens += compressed_tokens * chunks[static_cast<size_t>(c)];
  return tokens;
}

int64_t CachePlan::capacity() const {
  int64_t most = 0;
  for (int64_t chunk = 0; chunk < count(); ++chunk) most = std::max(most, cached_tokens(chunk));
  return most;
}

int64_t CachePlan::bytes(int64_t element_bytes) const {
  return 2 * layers * (capacity() + text_tokens) * heads * channels * element_bytes;
}

int64_t CachePlan::encoded_tokens() const {
  int64_t total = 0;
  for (int64_t chunk = 0; chunk + 1 < count(); ++chunk) {
    if (chunk < recent) {
      total += full_tokens * chunks[static_cast<size_t>(chunk)];
    } else {
      const int64_t old = chunk - recent;
      total +=
          compressed_tokens * chunks[static_cast<size_t>(old)] + full_tokens * (first_frame(chunk + 1) - first_frame(old + 1));
    }
  }
  return total;
}

}  // namespace af
