"""As many steps as fit into a time: `python examples/deadline.py my-bundle "a red fox in the snow"
1.5`.

The first video of a pipeline begins with one step that is timed. Later videos use that measurement,
so they use the time better.
"""

import sys

from anyflow_deploy import VideoPipeline

bundle, prompt, seconds = sys.argv[1:]

with VideoPipeline.from_bundle(bundle) as pipe:
    for seed in range(2):
        video = pipe(prompt, deadline_s=float(seconds), seed=seed, output_type="latent")
        (result,) = video.report.results[:1]
        outcome = "met" if result.slack >= 0 else "missed"
        print(
            f"video {seed}: {result.steps} steps in {result.seconds:.2f} s, the deadline was"
            f" {outcome}"
        )
