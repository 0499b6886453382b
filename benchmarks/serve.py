"""Measures the overhead of the HTTP service, and whether its memory grows.

    python benchmarks/serve.py [BUNDLE] [--videos 100]

It starts `anyflow-serve` on a bundle (without one: a tiny causal pipeline, random weights) and
generates short videos one after the other, each watched through its WebSocket while another thread
polls. The overhead of a video is the time that the client waits, from its request to the end of the
stream, less the time that the server reports for text, steps, VAE and mp4.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from common import print_result
from websockets.sync.client import connect

from anyflow_deploy import MODELS
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.tiny import save_tiny_pipeline
from anyflow_deploy.export.exporter import export_bundle

SHORT = {"prompt": "a red fox", "num_frames": 17, "num_inference_steps": 2, "seed": 0}


TENTHS = 10
"""How often the server's memory is read. A row of numbers shows whether it grows without bound, two
would not."""


def watch_video(url: str, client: httpx.Client) -> tuple[float, float, dict[str, Any]]:
    """Generate a video; return the seconds to its first chunk and to its end, and the video."""
    start = time.perf_counter()
    first = 0.0
    name = client.post("/v1/videos", json=SHORT).raise_for_status().json()["id"]
    with connect(f"ws://{url}/v1/videos/{name}/stream") as socket:
        for message in socket:
            if isinstance(message, bytes):
                first = first or time.perf_counter() - start
            elif (event := json.loads(message))["type"] == "end":
                end = time.perf_counter() - start
    client.delete(f"/v1/videos/{name}")
    return first, end, event["video"]


def resident_mb(pid: int) -> float:
    match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) / 1024 if match else 0.0


def poll_list(client: httpx.Client, times: list[float], stop: threading.Event) -> None:
    while not stop.wait(0.05):
        start = time.perf_counter()
        client.get("/v1/videos?limit=1")
        times.append(time.perf_counter() - start)


def measure_overhead(url: str, pid: int, count: int) -> dict[str, Any]:
    polls: list[float] = []
    stop = threading.Event()
    with (
        httpx.Client(base_url=f"http://{url}", timeout=600) as client,
        httpx.Client(base_url=f"http://{url}") as other,
    ):
        for _ in range(5):
            watch_video(url, client)
        resident = [resident_mb(pid)]
        thread = threading.Thread(target=poll_list, args=(other, polls, stop))
        thread.start()
        runs = []
        for number in range(1, count + 1):
            runs.append(watch_video(url, client))
            if number * TENTHS // count > (number - 1) * TENTHS // count:
                resident.append(resident_mb(pid))
        stop.set()
        thread.join()
    overhead = sorted(end - video["timings"]["total"] for _, end, video in runs)
    late = sorted(first - video["timings"]["first_frame"] for first, _, video in runs)
    polls.sort()
    return {
        "videos": count,
        "video_s": round(statistics.median(end for _, end, _ in runs), 4),
        "overhead_ms": {"p50": _ms(overhead, 0.5), "p99": _ms(overhead, 0.99)},
        "first_chunk_later_ms": {"p50": _ms(late, 0.5), "p99": _ms(late, 0.99)},
        "poll_while_working_ms": {"p50": _ms(polls, 0.5), "p99": _ms(polls, 0.99)},
        "resident_mb": [round(size, 1) for size in resident],
    }


def _ms(values: list[float], share: float) -> float:
    return round(1000 * values[min(len(values) - 1, int(share * len(values)))], 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", nargs="?", type=Path)
    parser.add_argument("--videos", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = options.bundle
        if bundle is None:
            bundle = Path(folder) / "bundle"
            save_tiny_pipeline(MODELS["far-tiny"], Path(folder) / "pipeline")
            export_bundle(open_checkpoint(Path(folder) / "pipeline"), bundle)
        command = [
            sys.executable,
            "-c",
            "from anyflow_deploy.cli.serve import main; main()",
            str(bundle.resolve()),
            "--port",
            "0",
        ]
        log = Path(folder) / "log"
        with log.open("w") as file:
            server = subprocess.Popen([*command, "--warm-up"], cwd=folder, stderr=file)
        try:
            while not (
                match := re.search(r"serving .* on http://(127\.0\.0\.1:\d+)", log.read_text())
            ):
                if server.poll() is not None:
                    sys.exit(log.read_text())
                time.sleep(0.1)
            time.sleep(1)
            result = measure_overhead(match[1], server.pid, options.videos)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    print_result("serve", result)


if __name__ == "__main__":
    main()
