"""A causal model's video, chunk by chunk: `python examples/streaming.py my-causal "a red fox in the
snow"`.

The first chunk is ready long before the last one is started. Leaving the loop ends the stream and
releases the cache.
"""

import sys
import time

from anyflow_deploy import VideoPipeline

bundle, prompt = sys.argv[1:]

with VideoPipeline.from_bundle(bundle) as pipe:
    start = time.perf_counter()
    for chunk in pipe.stream(prompt, num_inference_steps=4, seed=0):
        last_frame = chunk.first_frame + len(chunk.frames) - 1
        seconds = time.perf_counter() - start
        print(
            f"chunk {chunk.index}: frames {chunk.first_frame} to {last_frame} after {seconds:.2f} s"
        )
