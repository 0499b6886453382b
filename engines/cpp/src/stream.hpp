// A causal stream: what belongs where in the cache, and when it has to be written; the same order as engines/streaming.py.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "engine.hpp"

namespace af {

class CacheStream {
 public:
  // `cache` has room for plan.capacity() tokens.
  CacheStream(std::unique_ptr<Cache> cache, CachePlan plan) : cache_(std::move(cache)), plan_(std::move(plan)) {}

  // A run of the next chunk, on the cache as it is.
  std::unique_ptr<Run> start(const Latents& noise);
  // Enter the next chunk, now clean (or given), into the cache; the one after it becomes the next. It is not the last one.
  void remember(std::vector<float> clean, const LatentShape& shape);

 private:
  struct Finished {
    int64_t chunk;
    std::vector<float> clean;
    LatentShape shape;
  };

  void compress(const Finished& old);
  void forget(const std::vector<int64_t>& kept);
  void write(const std::string& graph, const Finished& from, int64_t past, int64_t tokens);
  std::vector<int64_t> positions(int64_t chunk) const;
  int64_t compressed_tokens(int64_t chunk) const { return plan_.chunks[static_cast<size_t>(chunk)] * plan_.compressed_tokens; }
  int64_t full_tokens(int64_t chunk) const { return plan_.chunks[static_cast<size_t>(chunk)] * plan_.full_tokens; }

  std::unique_ptr<Cache> cache_;
  CachePlan plan_;
  int64_t chunk_ = 0, compressed_ = 0;
  std::deque<Finished> recent_;
  std::vector<int64_t> kept_;
};

}  // namespace af
