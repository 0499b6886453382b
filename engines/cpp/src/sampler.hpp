// The sampling loop and the stream of chunks, for every backend; the same as engines/sampler.py.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "deadline.hpp"
#include "engine.hpp"
#include "stream.hpp"

namespace af {

using Course = std::variant<Schedule, Deadline>;

struct Step {
  int64_t index, steps;
  double t, r;
  LatentShape shape;
  std::function<void(float*)> read;
};

struct Sampling {
  Course course;
  std::function<void(const Step&)> on_step;
  std::function<bool()> abort;
  std::function<void(const Outcome&)> on_end;
};

// From the run's state to clean, into `clean`.
void sample(Run& run, const Sampling& sampling, float* clean);

struct Chunk {
  int64_t index, first_frame, frames;
  bool given;
  std::vector<float> latents;
};

// A video, chunk by chunk. All that can be refused is refused by the constructor.
class Video {
 public:
  struct Options {
    std::vector<int64_t> chunk_plan;
    std::optional<int64_t> window;
    const float* context = nullptr;
    int64_t context_frames = 0;
  };

  Video(std::shared_ptr<Engine> engine, const Latents& noise, const Text& text, const Options& options);
  // nullptr: there is none left. The last chunk is remembered only when the next one is asked for.
  const Chunk* next(const Sampling& sampling);

 private:
  std::vector<float> frames_of(const std::vector<float>& video, int64_t chunk) const;
  void check_context(const Options& options);

  std::shared_ptr<Engine> engine_;
  std::vector<float> noise_, text_, context_;
  LatentShape shape_;
  TextShape text_shape_;
  CachePlan plan_;
  int64_t given_ = 0, index_ = 0;
  std::unique_ptr<CacheStream> memory_;
  std::optional<Chunk> last_;
  bool remembered_ = true, broken_ = false;
};

}  // namespace af
