"""An engine inside diffusers: `python examples/diffusers_dropin.py my-anyflow my-bundle "a red fox in the snow" fox.mp4`.

diffusers keeps its own loop, scheduler, callbacks and guidance, and asks the engine for velocities. `EngineFARTransformer` does
the same in `AnyFlowFARPipeline`.
"""

import sys

from diffusers import AnyFlowPipeline
from diffusers.utils import export_to_video

from anyflow_deploy import load_bundle, load_engine
from anyflow_deploy.pipelines.diffusers import EngineTransformer

checkpoint, bundle_folder, prompt, output = sys.argv[1:]

bundle = load_bundle(bundle_folder)
video = bundle.manifest.video
pipe = AnyFlowPipeline.from_pretrained(checkpoint, transformer=None)
pipe.transformer = EngineTransformer(load_engine(bundle))
frames = pipe(prompt, num_inference_steps=4, height=video.height, width=video.width, num_frames=video.frames).frames[0]
export_to_video(frames, output, fps=video.fps)
print(f"{len(frames)} frames, written to {output}")
