"""What both sides of a comparison are fed, one set of arrays.

A bidirectional graph takes noise, times and text. A causal model's graphs also take keys and
values: those of the text come from graph `text`, and those of the past from a chunk that is written
into an empty cache first, both computed by the reference. Whatever the candidate takes in float16
is rounded to it beforehand, so that both sides start from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.engines.engine import Array, frame_times
from anyflow_deploy.engines.sampler import noise
from anyflow_deploy.engines.streaming import cache_tensor_names
from anyflow_deploy.errors import BackendError

Feed = dict[str, NDArray[Any]]
"""An array for every input of a graph."""

RunGraph = Callable[[str, Feed], dict[str, Array]]
"""Runs a graph of the reference, by its name, and returns all its outputs, by theirs."""


@dataclass(frozen=True)
class DebugState:
    """Where a step is taken from.

    Attributes:
        shape: of the latents, (B, F, C, H, W); of a causal model's chunk.
        text: prompt embeddings, float32 (B, L, D).
        t, r: source and target time of every frame, in timesteps 0 to 1000.
        seed: of the latents.
        past_frames: latent frames of the chunk in a causal model's cache.
    """

    shape: tuple[int, ...]
    text: Array
    t: float
    r: float
    seed: int = 0
    past_frames: int = 1


def make_feed(manifest: Manifest, graph: str, state: DebugState, run: RunGraph) -> Feed:
    """Make the inputs of a graph, float32 where they are floating-point numbers.

    Args:
        manifest: of the candidate.
        graph: one of the manifest's.
        state: where the step is taken from.
        run: computes what a causal graph needs of others.

    Raises:
        BackendError: the graph takes bfloat16, which numpy has no arrays of.
    """
    kinds = {tensor.name: tensor.dtype for tensor in manifest.graphs[graph].inputs}
    if "bfloat16" in kinds.values():
        raise BackendError(
            f"graph {graph!r} takes its cache in bfloat16, which cannot be fed from here. Choose"
            " --graph text, or debug an fp16 export."
        )
    if manifest.kind == "causal":
        feed = _CausalFeeds(manifest, state, run).of(graph)
    else:
        feed = {**_step_inputs(state), "text": state.text}
    return {
        name: feed[name].astype(np.float16).astype(np.float32) if kind == "float16" else feed[name]
        for name, kind in kinds.items()
    }


def _step_inputs(state: DebugState) -> Feed:
    source, target = frame_times(state.t, state.r, state.shape)
    return {"latents": noise(state.shape, state.seed), "t": source, "r": target}


class _CausalFeeds:
    """Inputs of a causal model's graphs: of the second chunk, with the first one in the cache."""

    def __init__(self, manifest: Manifest, state: DebugState, run: RunGraph) -> None:
        a = manifest.architecture
        self._state, self._run = state, run
        self._names = cache_tensor_names(a.num_layers)
        self._heads = (a.num_attention_heads, a.attention_head_dim)

    def of(self, graph: str) -> Feed:
        """Make the inputs of graph `text`, `chunk` or `compress`."""
        if graph == "text":
            return {"text": self._state.text}
        text = self._run("text", {"text": self._state.text})
        first = (1, self._state.past_frames, *self._state.shape[2:])
        clean = _positioned(noise(first, self._state.seed + 1), 0)
        if graph == "chunk":
            zeros = np.zeros(first[:2], np.float32)
            clean |= {"t": zeros, "r": zeros}
        written = self._run(graph, {**clean, **text, **self._past({})})
        latents = _positioned(noise(self._state.shape, self._state.seed), first[1])
        return {**_step_inputs(self._state), **latents, **text, **self._past(written)}

    def _past(self, written: dict[str, Array]) -> Feed:
        """The cache; empty where nothing was written."""
        empty = np.zeros((1, 0, *self._heads), np.float32)
        return {f"past_{name}": written.get(name, empty) for name in self._names}


def _positioned(latents: Array, first: int) -> Feed:
    positions = np.arange(first, first + latents.shape[1], dtype=np.int64)
    return {"latents": latents, "positions": positions}
