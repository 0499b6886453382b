"""Text encoder and VAE, timed apart from the transformer: what else a prompt goes through on its way to frames.

Both are PyTorch on the CPU here, as `anyflow-generate` runs them. Each is loaded, run until warm, run again, and let go.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.profiling.errors import AbsentError
from anyflow_deploy.profiling.memory import Peak
from anyflow_deploy.profiling.record import Stage
from anyflow_deploy.profiling.summary_statistics import latency_from_samples
from anyflow_deploy.profiling.timing import Rules, clock, no_garbage_collection
from anyflow_deploy.profiling.workload import Video

TEXT, VAE = "text encoder", "VAE"

SHARE = 0.25
"""Of the budget of a shape that a stage may take."""

LEAST, MOST = 3, 30


def pipeline_folder(manifest: Manifest, given: str | None, part: str) -> Path:
    """Where text encoder or VAE are.

    Raises:
        AbsentError: they are not at hand, or the packages that run them are not.
    """
    try:
        from anyflow_deploy.pipelines.pipeline_folder import pipeline_of

        parts = ["tokenizer", "text_encoder"] if part == TEXT else ["vae"]
        return pipeline_of(manifest, given, parts)
    except ImportError as error:
        raise AbsentError(f"{error.name} is not installed (pip install 'anyflow-deploy[export]')") from None
    except AnyFlowError as error:
        if given is not None:
            raise
        raise AbsentError(f"not at hand: {error}") from None


def text_stage(folder: Path, manifest: Manifest, prompt: str, rules: Rules) -> Stage:
    """The text encoder on one prompt, padded as always."""
    from anyflow_deploy.pipelines.text_encoder import PromptEncoder

    gc.collect()
    peak, began = Peak(), clock()
    encoder, tokens = PromptEncoder(folder), manifest.video.text_tokens
    encoder.load()
    loading = clock() - began
    peak.loaded()
    times = _repeated(lambda: encoder.encode([prompt], tokens), rules)
    record = Stage(
        name=TEXT, device="cpu", load_seconds=loading, latency=latency_from_samples(times), memory=peak.record()
    )  # fmt: skip
    return record


def vae_stage(folder: Path, video: Video, rules: Rules) -> Stage:
    """The VAE's decoder on the latents of one video: whole, and its first latent frame and first chunk alone."""
    from anyflow_deploy.pipelines.vae import StreamingDecoder, load_vae

    gc.collect()
    peak, began = Peak(), clock()
    vae = load_vae(folder)
    loading = clock() - began
    peak.loaded()
    first = video.plan.chunks[0] if video.plan is not None else video.shape.frames
    cuts = {"first frame": 1, "first chunk": first} if video.plan is not None else {"first frame": 1}
    pieces = {name: np.ascontiguousarray(video.latents[:, :frames]) for name, frames in cuts.items()}
    whole = _repeated(lambda: StreamingDecoder(vae).decode(video.latents), rules)
    parts = {name: _repeated(_decoding(StreamingDecoder, vae, piece), rules) for name, piece in pieces.items()}
    record = Stage(
        name=VAE,
        device="cpu",
        load_seconds=loading,
        latency=latency_from_samples(whole),
        parts={name: latency_from_samples(times) for name, times in parts.items()},
        memory=peak.record(),
    )
    return record


def _decoding(decoder: Any, vae: Any, piece: Any) -> Callable[[], Any]:
    return lambda: decoder(vae).decode(piece)


def _repeated(work: Callable[[], Any], rules: Rules) -> list[float]:
    """One run that does not count, then as many as a share of the budget holds."""
    work()
    times: list[float] = []
    with no_garbage_collection():
        while len(times) < (rules.rounds or LEAST) or (
            rules.rounds is None and len(times) < MOST and sum(times) < SHARE * rules.seconds
        ):
            began = clock()
            work()
            times.append(clock() - began)
    return times
