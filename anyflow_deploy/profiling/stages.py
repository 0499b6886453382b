"""Time the text encoder and the VAE, apart from the transformer.

Both are PyTorch on the CPU here, as `anyflow-generate` runs them. Each is loaded, run until warm,
run again, and released.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.profiling.errors import MeasurementUnavailableError
from anyflow_deploy.profiling.memory import PeakMemory
from anyflow_deploy.profiling.record import StageTiming
from anyflow_deploy.profiling.summary_statistics import latency_from_samples
from anyflow_deploy.profiling.timing import TimingRules, clock, pause_garbage_collection
from anyflow_deploy.profiling.workload import VideoWorkload

TEXT, VAE = "text encoder", "VAE"

SHARE = 0.25
"""Share of a shape's budget that a stage may take."""

MIN_RUNS, MAX_RUNS = 3, 30


def find_pipeline_folder(manifest: Manifest, pipeline: str | None, part: str) -> Path:
    """Find the folder of the text encoder or the VAE.

    Raises:
        MeasurementUnavailableError: the folder, or a package that runs the part, is missing.
    """
    try:
        from anyflow_deploy.pipelines.pipeline_folder import find_pipeline

        parts = ["tokenizer", "text_encoder"] if part == TEXT else ["vae"]
        return find_pipeline(manifest, pipeline, parts)
    except ImportError as error:
        raise MeasurementUnavailableError(
            f"{error.name} is not installed (pip install 'anyflow-deploy[export]')"
        ) from None
    except AnyFlowError as error:
        if pipeline is not None:
            raise
        raise MeasurementUnavailableError(f"not available: {error}") from None


def measure_text_encoder(
    folder: Path, manifest: Manifest, prompt: str, rules: TimingRules
) -> StageTiming:
    """Time the text encoder on one prompt, padded as always."""
    from anyflow_deploy.pipelines.text_encoder import PromptEncoder

    gc.collect()
    peak = PeakMemory()
    start = clock()
    encoder = PromptEncoder(folder)
    tokens = manifest.video.text_tokens
    encoder.load()
    load_seconds = clock() - start
    peak.mark_loaded()
    times = _time_repeatedly(lambda: encoder.encode([prompt], tokens), rules)
    record = StageTiming(
        name=TEXT,
        device="cpu",
        load_seconds=load_seconds,
        latency=latency_from_samples(times),
        memory=peak.record(),
    )
    return record


def measure_vae(folder: Path, video: VideoWorkload, rules: TimingRules) -> StageTiming:
    """Time the VAE's decoder on a whole video, its first latent frame, and its first chunk."""
    from anyflow_deploy.pipelines.vae import StreamingDecoder, load_vae

    gc.collect()
    peak = PeakMemory()
    start = clock()
    vae = load_vae(folder)
    load_seconds = clock() - start
    peak.mark_loaded()
    first = video.plan.chunks[0] if video.plan is not None else video.shape.frames
    cuts = (
        {"first frame": 1, "first chunk": first} if video.plan is not None else {"first frame": 1}
    )
    parts_latents = {
        name: np.ascontiguousarray(video.latents[:, :frames]) for name, frames in cuts.items()
    }
    whole_times = _time_repeatedly(lambda: StreamingDecoder(vae).decode(video.latents), rules)
    parts = {
        name: _time_repeatedly(_make_decode_call(StreamingDecoder, vae, latents), rules)
        for name, latents in parts_latents.items()
    }
    record = StageTiming(
        name=VAE,
        device="cpu",
        load_seconds=load_seconds,
        latency=latency_from_samples(whole_times),
        parts={name: latency_from_samples(times) for name, times in parts.items()},
        memory=peak.record(),
    )
    return record


def _make_decode_call(decoder: Any, vae: Any, latents: Any) -> Callable[[], Any]:
    return lambda: decoder(vae).decode(latents)


def _time_repeatedly(run: Callable[[], Any], rules: TimingRules) -> list[float]:
    """Run once without counting, then as often as a share of the budget allows."""
    run()
    times: list[float] = []
    with pause_garbage_collection():
        while len(times) < (rules.rounds or MIN_RUNS) or (
            rules.rounds is None and len(times) < MAX_RUNS and sum(times) < SHARE * rules.seconds
        ):
            start = clock()
            run()
            times.append(clock() - start)
    return times
