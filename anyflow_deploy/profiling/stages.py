"""Text encoder and VAE, timed apart from the transformer: what else a prompt goes through on its
way to frames.

Both are PyTorch on the CPU here, as `anyflow-generate` runs them. Each is loaded, run until warm,
run again, and let go.
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
"""Of the budget of a shape that a stage may take."""

MIN_RUNS, MAX_RUNS = 3, 30


def find_pipeline_folder(manifest: Manifest, pipeline: str | None, part: str) -> Path:
    """Where text encoder or VAE are.

    Raises:
        MeasurementUnavailableError: they are not at hand, or the packages that run them are not.
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
        raise MeasurementUnavailableError(f"not at hand: {error}") from None


def measure_text_encoder(
    folder: Path, manifest: Manifest, prompt: str, rules: TimingRules
) -> StageTiming:
    """The text encoder on one prompt, padded as always."""
    from anyflow_deploy.pipelines.text_encoder import PromptEncoder

    gc.collect()
    peak, began = PeakMemory(), clock()
    encoder = PromptEncoder(folder)
    tokens = manifest.video.text_tokens
    encoder.load()
    loading = clock() - began
    peak.mark_loaded()
    times = _time_repeatedly(lambda: encoder.encode([prompt], tokens), rules)
    record = StageTiming(
        name=TEXT,
        device="cpu",
        load_seconds=loading,
        latency=latency_from_samples(times),
        memory=peak.record(),
    )
    return record


def measure_vae(folder: Path, video: VideoWorkload, rules: TimingRules) -> StageTiming:
    """The VAE's decoder on the latents of one video: whole, and its first latent frame and first
    chunk alone."""
    from anyflow_deploy.pipelines.vae import StreamingDecoder, load_vae

    gc.collect()
    peak, began = PeakMemory(), clock()
    vae = load_vae(folder)
    loading = clock() - began
    peak.mark_loaded()
    first = video.plan.chunks[0] if video.plan is not None else video.shape.frames
    cuts = (
        {"first frame": 1, "first chunk": first} if video.plan is not None else {"first frame": 1}
    )
    pieces = {
        name: np.ascontiguousarray(video.latents[:, :frames]) for name, frames in cuts.items()
    }
    whole = _time_repeatedly(lambda: StreamingDecoder(vae).decode(video.latents), rules)
    parts = {
        name: _time_repeatedly(_piece_decoder(StreamingDecoder, vae, piece), rules)
        for name, piece in pieces.items()
    }
    record = StageTiming(
        name=VAE,
        device="cpu",
        load_seconds=loading,
        latency=latency_from_samples(whole),
        parts={name: latency_from_samples(times) for name, times in parts.items()},
        memory=peak.record(),
    )
    return record


def _piece_decoder(decoder: Any, vae: Any, piece: Any) -> Callable[[], Any]:
    return lambda: decoder(vae).decode(piece)


def _time_repeatedly(run: Callable[[], Any], rules: TimingRules) -> list[float]:
    """One run that does not count, then as many as a share of the budget holds."""
    run()
    times: list[float] = []
    with pause_garbage_collection():
        while len(times) < (rules.rounds or MIN_RUNS) or (
            rules.rounds is None and len(times) < MAX_RUNS and sum(times) < SHARE * rules.seconds
        ):
            began = clock()
            run()
            times.append(clock() - began)
    return times
