"""Ask `anyflow-serve` for a video: `python examples/http_client.py http://127.0.0.1:8000 "a red fox
in the snow" fox.mp4`.

It needs only httpx. OpenAI's Python client works, too: the interface is its `/v1/videos`.
"""

import sys
import time
from pathlib import Path

import httpx

url, prompt, output = sys.argv[1:]

with httpx.Client(base_url=url, timeout=60) as client:
    request = {"prompt": prompt, "num_inference_steps": 4, "seed": 0}
    video = client.post("/v1/videos", json=request).raise_for_status().json()
    while video["status"] not in ("completed", "failed"):
        time.sleep(0.2)
        video = client.get(f"/v1/videos/{video['id']}").raise_for_status().json()
    if video["status"] == "failed":
        sys.exit(f"failed: {video['error']['message']}")
    content = client.get(f"/v1/videos/{video['id']}/content").raise_for_status().content

Path(output).write_bytes(content)
print(f"{sum(video['steps'])} steps, {len(content)} bytes, written to {output}")
