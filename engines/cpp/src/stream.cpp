#include "stream.hpp"

#include <algorithm>
#include <numeric>

namespace af {

std::unique_ptr<Run> CacheStream::start(const Latents& noise) {
  return cache_->run(noise, positions(chunk_), plan_.cached_tokens(chunk_));
}

void CacheStream::remember(std::vector<float> clean, const LatentShape& shape) {
  recent_.push_back({chunk_, std::move(clean), shape});
  size_t pending = 1;
  if (static_cast<int64_t>(recent_.size()) > plan_.recent) {
    const Finished oldest = std::move(recent_.front());
    recent_.pop_front();
    compress(oldest);
    pending = recent_.size();  // what precedes them has changed
  }
  int64_t filled = compressed_;
  for (size_t i = 0; i < recent_.size(); ++i) {
    const int64_t tokens = full_tokens(recent_[i].chunk);
    if (i >= recent_.size() - pending) write("chunk", recent_[i], filled, tokens);
    filled += tokens;
  }
  ++chunk_;
}

void CacheStream::compress(const Finished& old) {
  forget(plan_.kept(old.chunk + 1 + plan_.recent));
  kept_.push_back(old.chunk);
  const int64_t tokens = compressed_tokens(old.chunk);
  write("compress", old, compressed_, tokens);
  compressed_ += tokens;
}

void CacheStream::forget(const std::vector<int64_t>& kept) {
  int64_t before = 0;
  std::vector<int64_t> left;
  for (const int64_t chunk : kept_) {
    const int64_t tokens = compressed_tokens(chunk);
    if (std::find(kept.begin(), kept.end(), chunk) != kept.end()) {
      left.push_back(chunk), before += tokens;
      continue;
    }
    cache_->move(before, before + tokens, compressed_ - before - tokens);
    compressed_ -= tokens;
  }
  kept_ = std::move(left);
}

void CacheStream::write(const std::string& graph, const Finished& from, int64_t past, int64_t tokens) {
  cache_->write(graph, {from.clean.data(), from.shape}, positions(from.chunk), past, tokens);
}

std::vector<int64_t> CacheStream::positions(int64_t chunk) const {
  std::vector<int64_t> frames(static_cast<size_t>(plan_.chunks[static_cast<size_t>(chunk)]));
  std::iota(frames.begin(), frames.end(), plan_.first_frame(chunk));
  return frames;
}

}  // namespace af
