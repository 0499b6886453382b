// A video of a causal model, chunk by chunk; each could be decoded and shown while the next is made.
#include <chrono>

#include "arguments.hpp"

int main(int count, char** words) {
  return told([&] {
    const Arguments given(
        count, words,
        "usage: stream BUNDLE --embeds FILE --output FILE [--steps N | --deadline SECONDS] [--chunks 1,3,3] [--window N]\n"
        "              [--context FILE] [--seed N | --noise FILE] [--latents F,H,W] [--backend NAME] [--engine NAME] [--threads "
        "N]",
        {"--embeds", "--output", "--steps", "--deadline", "--chunks", "--window", "--context", "--seed", "--noise", "--latents",
         "--backend", "--engine", "--threads"});
    const anyflow::Bundle bundle(given.bundle);
    const auto info = bundle.info();
    anyflow::Engine engine(bundle, given.engine());
    anyflow::StreamOptions options;
    options.chunk_plan = given.numbers("--chunks"), options.window = static_cast<std::int64_t>(given.number("--window", 0));
    if (given.has("--context")) options.context = anyflow::load<5>(given.text("--context"), "latents");
    auto video = given.noise(info);
    auto sampling = given.sampling(info);
    if (sampling.deadline) sampling.deadline->pace.emplace();  // chunks learn from each other
    auto stream = engine.stream(video, anyflow::load<3>(given.text("--embeds"), "prompt_embeds"), options);
    const std::size_t frame = video.data.size() / static_cast<std::size_t>(video.shape[1]);
    const auto started = std::chrono::steady_clock::now();
    while (const auto chunk = stream.next(sampling)) {
      std::copy(chunk->latents.data.begin(), chunk->latents.data.end(),
                video.data.begin() + static_cast<std::ptrdiff_t>(frame) * chunk->first_frame);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
      std::cout << "chunk " << chunk->index << ": " << chunk->latents.shape[1] << " latent frames from " << chunk->first_frame
                << ", after " << seconds.count() << " s" << std::endl;
    }
    anyflow::save(given.text("--output", "latents.safetensors"), "latents", video);
  });
}
