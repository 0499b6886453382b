// How much a causal model remembers, computed before anything runs; see engines/kv_cache.py, whose picture of a buffer is:
//
//     [ chunk 0 | chunk 1 | … | chunk k-3 ][ chunk k-2 | chunk k-1 ]   while chunk k is made
//       compressed, written once             full, written again whenever what precedes them changed
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "manifest.hpp"

namespace af {

struct CachePlan {
  std::vector<int64_t> chunks;  // latent frames of each
  int64_t recent;               // finished chunks that stay at full resolution
  std::optional<int64_t> window;
  int64_t full_tokens, compressed_tokens;  // of one latent frame
  int64_t text_tokens, layers, heads, channels;

  // Throws Error. Empty `chunks`: the model's own plan.
  static CachePlan make(const Architecture& a, std::vector<int64_t> chunks, int64_t height, int64_t width,
                        std::optional<int64_t> window, int64_t text_tokens);

  int64_t count() const { return static_cast<int64_t>(chunks.size()); }
  int64_t frames() const { return first_frame(count()); }
  int64_t first_frame(int64_t chunk) const;
  // Compressed chunks that a chunk finds in the cache, in order.
  std::vector<int64_t> kept(int64_t chunk) const;
  // Tokens that a chunk finds in the cache.
  int64_t cached_tokens(int64_t chunk) const;
  int64_t capacity() const;
  int64_t bytes(int64_t element_bytes) const;
  int64_t encoded_tokens() const;
};

}  // namespace af
