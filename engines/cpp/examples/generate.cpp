// A sample of a bidirectional model, from prompt embeddings to latents.
#include "arguments.hpp"

int main(int count, char** words) {
  return told([&] {
    const Arguments given(
        count, words,
        "usage: generate BUNDLE --embeds FILE --output FILE [--steps N | --deadline SECONDS] [--seed N | --noise FILE]\n"
        "                [--latents F,H,W] [--backend NAME] [--engine NAME] [--threads N]",
        {"--embeds", "--output", "--steps", "--deadline", "--seed", "--noise", "--latents", "--backend", "--engine",
         "--threads"});
    const anyflow::Bundle bundle(given.bundle);
    const auto info = bundle.info();
    anyflow::Engine engine(bundle, given.engine());
    std::cout << engine.description() << "\n";
    auto sampling = given.sampling(info);
    sampling.on_step = [](const anyflow::Step& step) {
      std::cout << "step " << step.index() + 1 << " of " << step.steps() << ": " << step.t() << " -> " << step.r() << "\n";
    };
    sampling.on_end = [](const anyflow_outcome& outcome) {
      std::cout << outcome.steps << " steps in " << outcome.seconds << " s of " << outcome.deadline << " s\n";
    };
    const auto clean = engine.sample(given.noise(info), anyflow::load<3>(given.text("--embeds"), "prompt_embeds"), sampling);
    anyflow::save(given.text("--output", "latents.safetensors"), "latents", clean);
  });
}
