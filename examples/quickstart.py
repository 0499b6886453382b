"""A video from a prompt: `python examples/quickstart.py my-bundle "a red fox in the snow" fox.mp4`.

The text encoder and the VAE come from the bundle's own pipeline folder, and run in PyTorch. The
engine is ONNX Runtime.
"""

import sys

from anyflow_deploy import VideoPipeline

bundle, prompt, output = sys.argv[1:]

with VideoPipeline.from_bundle(bundle) as pipe:
    video = pipe(prompt, num_inference_steps=4, seed=0)
video.save(output)
print(f"{sum(video.report.steps)} steps, {len(video.frames)} frames, written to {output}")
