"""An engine inside diffusers: `python examples/diffusers_dropin.py my-anyflow my-bundle "a red fox
in the snow" fox.mp4`.

diffusers keeps its own loop, scheduler, callbacks and guidance, and asks the engine for velocities.
`EngineFARTransformer` does the same in `AnyFlowFARPipeline`.
"""

import sys
from pathlib import Path

from diffusers import AnyFlowPipeline

from anyflow_deploy import load_bundle, load_engine
from anyflow_deploy.pipelines.diffusers import EngineTransformer
from anyflow_deploy.pipelines.video_io import save_video

checkpoint, bundle_folder, prompt, output = sys.argv[1:]

bundle = load_bundle(bundle_folder)
video = bundle.manifest.video
pipe = AnyFlowPipeline.from_pretrained(checkpoint, transformer=None)
pipe.transformer = EngineTransformer(load_engine(bundle))
frames = pipe(
    prompt, num_inference_steps=4, height=video.height, width=video.width, num_frames=video.frames
).frames[0]
save_video(Path(output), (frames * 255).round().astype("uint8"), video.fps)
print(f"{len(frames)} frames, written to {output}")
