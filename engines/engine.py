"""What a backend is: an `Engine` that opens runs, and a `Run` that holds one sample on its way from
noise to clean.

With this split the sampler does not depend on devices. A run owns the state z in the form of its
backend (a numpy array, a buffer on the GPU), advances it in place, and copies it back only in
`read`. Runs on one engine are independent of each other. A backend implements these two protocols
in its folder and has a row in `registry.BACKENDS`.

Legend: B batch, F latent frames, C channels, H W latent rows and columns, L text tokens, D text
channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.kv_cache import CachePlan
from anyflow_deploy.errors import AnyFlowError, ShapeError
from anyflow_deploy.models import Architecture
from anyflow_deploy.schedule import TRAIN_TIMESTEPS
from anyflow_deploy.shape_ranges import ShapeRanges

Array = NDArray[np.float32]


class Run(Protocol):
    """One sample between noise and clean latents.

    Close it, or use it as a context manager, to give its memory back.
    """

    def step(self, t: ArrayLike, r: ArrayLike) -> None:
        """Replace the state z_t by z_r; it is there when this returns.

        Args:
            t, r: timesteps with 1000 >= t >= r >= 0; one number for all frames, or an array (B, F).

        Raises:
            AnyFlowError: times out of order or range.
        """
        ...

    def velocity(self, t: ArrayLike, r: ArrayLike) -> Array:
        """Return the average velocity u(z_t, t, r), float32 (B, F, C, H, W).

        The state stays as it is. r = t gives the instantaneous velocity.
        """
        ...

    def read(self) -> Array:
        """Return a copy of the state, float32 (B, F, C, H, W)."""
        ...

    def close(self) -> None:
        """Release the run's memory."""
        ...

    def __enter__(self) -> Run: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Engine(Protocol):
    """A model ready to run. Safe to share between threads as long as each has runs of its own."""

    @property
    def description(self) -> str:
        """Backend, version, device and precision, for people and reports."""
        ...

    @property
    def architecture(self) -> Architecture:
        """The network it runs."""
        ...

    @property
    def ranges(self) -> ShapeRanges:
        """The shapes it accepts."""
        ...

    def start(self, latents: ArrayLike, text: ArrayLike) -> Run:
        """Open a run.

        Args:
            latents: the state to start from, float32 (B, F, C, H, W).
            text: prompt embeddings, float32 (B, L, D).

        Raises:
            ShapeError: outside the declared ranges.
        """
        ...

    def open_stream(self, text: ArrayLike, plan: CachePlan) -> Stream:
        """Start a video of a causal model.

        Args:
            text: prompt embeddings, float32 (1, L, D).
            plan: from `cache_plan`.

        Raises:
            AnyFlowError: the bundle is bidirectional.
        """
        ...

    def close(self) -> None:
        """Release the engine."""
        ...


class Stream(Protocol):
    """A video that is generated chunk by chunk, with the cache of its earlier chunks.

    Close it to give the cache back.
    """

    def start(self, latents: Array) -> Run:
        """Open a run of the next chunk, on the cache as it is.

        Args:
            latents: noise of the chunk, float32 (1, frames of the chunk, C, H, W); left as it is.
        """
        ...

    def append(self, latents: Array) -> None:
        """Encode the next chunk, clean, into the cache; the chunk after it becomes the next.

        Raises:
            AnyFlowError: nothing comes after it in the plan.
        """
        ...

    def extend(self, plan: CachePlan) -> None:
        """Replace the plan by one that agrees on the finished chunks.

        The cache grows where the new plan needs more room.
        """
        ...

    def close(self) -> None:
        """Release the cache."""
        ...


class BundleEngine(Engine, Protocol):
    """An engine made from a bundle."""

    @property
    def bundle(self) -> Bundle:
        """The bundle it was made from."""
        ...


class BundleEngineBase(ABC):
    """The parts that the engines of all backends share.

    A backend adds how an engine opens, starts and closes.

    Args:
        bundle: an opened bundle.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._closed = False

    @property
    @abstractmethod
    def runtime(self) -> str:
        """Backend, version and device, for people and reports."""

    @property
    def description(self) -> str:
        """Backend, version, device and precision, for people and reports."""
        return f"{self.runtime}, {self.bundle.manifest.precision}"

    @property
    def architecture(self) -> Architecture:
        """The network it runs."""
        return self.bundle.manifest.architecture

    @property
    def ranges(self) -> ShapeRanges:
        """The shapes it accepts: the bundle's, where the backend does not narrow them."""
        return self.bundle.manifest.shape_ranges

    def close(self) -> None:
        """Refuse every later start; a backend also releases its memory."""
        self._closed = True

    def _prepare_run(self, latents: ArrayLike, text: ArrayLike) -> tuple[Array, Array]:
        """Check what `start` was given, and return it as `prepare_inputs` does.

        Raises:
            AnyFlowError: the engine is closed, or its model is causal.
            ShapeError: outside the ranges.
        """
        self._check_open()
        if self.bundle.manifest.kind == "causal":
            raise AnyFlowError(
                f"{self.bundle.path} is a causal model, which generates chunk by chunk: use"
                " stream(), not sample()."
            )
        a = self.architecture
        return prepare_inputs(self.ranges, a.in_channels, a.text_dim, latents, text)

    def _prepare_stream(self, text: ArrayLike) -> Array:
        """Check what `open_stream` was given, and return it as `prepare_text` does.

        Raises:
            AnyFlowError: the engine is closed, or its model is bidirectional.
            ShapeError: outside the ranges.
        """
        self._check_open()
        if self.bundle.manifest.kind != "causal":
            raise AnyFlowError(
                f"{self.bundle.path} is a bidirectional model: use sample(), not stream()."
            )
        return prepare_text(self.ranges, self.architecture.text_dim, text)

    def _check_open(self) -> None:
        if self._closed:
            raise AnyFlowError("this engine is closed; load another with load_engine(bundle).")


def prepare_inputs(
    ranges: ShapeRanges, channels: int, text_dim: int, latents: ArrayLike, text: ArrayLike
) -> tuple[Array, Array]:
    """Check latents and text, and return them as contiguous float32 copies.

    Raises:
        ShapeError: outside the ranges, or with the wrong number of channels.
        AnyFlowError: not numbers, or not finite.
    """
    z = prepare_array("latents", latents)
    prompt_embeds = prepare_array("text", text)
    ranges.check(z.shape, prompt_embeds.shape)
    for name, axis, count, expected in (
        ("latents", 2, z.shape[2], channels),
        ("text", 2, prompt_embeds.shape[2], text_dim),
    ):
        if count != expected:
            raise ShapeError(
                f"{name} has {count} channels on axis {axis}; this model takes {expected}."
            )
    return z, prompt_embeds


def prepare_text(ranges: ShapeRanges, text_dim: int, text: ArrayLike) -> Array:
    """Check the prompt embeddings of one stream, and return a contiguous float32 (1, L, D).

    Raises:
        ShapeError: another shape, or outside the ranges.
        AnyFlowError: not numbers, or not finite.
    """
    prompt_embeds = prepare_array("text", text)
    if (
        prompt_embeds.ndim != 3
        or prompt_embeds.shape[0] != 1
        or prompt_embeds.shape[1] not in ranges.text
        or prompt_embeds.shape[2] != text_dim
    ):
        raise ShapeError(
            f"text has shape {prompt_embeds.shape}; a stream takes (1, {ranges.text}, {text_dim}):"
            " one video at a time."
        )
    return prompt_embeds


def prepare_array(name: str, values: ArrayLike) -> Array:
    """Check an array, and return a contiguous float32 copy of it.

    Raises:
        AnyFlowError: not numbers, or not finite.
    """
    array = np.array(values, order="C")
    if array.dtype.kind != "f":
        raise AnyFlowError(
            f"{name} has type {array.dtype}; allowed are floating-point arrays (they are run in"
            " float32)."
        )
    if not np.isfinite(array).all():
        raise AnyFlowError(f"{name} holds NaN or infinity; allowed are finite numbers.")
    return array.astype(np.float32, copy=False)


def frame_times(t: ArrayLike, r: ArrayLike, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Return source and target times as float32 (B, F).

    Args:
        t, r: numbers, or arrays that broadcast to (B, F).
        shape: of the latents.

    Raises:
        AnyFlowError: not 1000 >= t >= r >= 0 in every frame.
    """
    source, target = (
        _broadcast_per_frame(name, time, shape[:2]) for name, time in (("t", t), ("r", r))
    )
    if not ((source <= TRAIN_TIMESTEPS) & (source >= target) & (target >= 0)).all():
        raise AnyFlowError(
            f"t is {_summarize_times(source)} and r is {_summarize_times(target)}; allowed is 1000"
            " >= t >= r >= 0 in every frame."
        )
    return source, target


def _broadcast_per_frame(name: str, time: ArrayLike, shape: tuple[int, ...]) -> Array:
    values = np.asarray(time, dtype=np.float32)
    try:
        return np.array(np.broadcast_to(values, shape), order="C")
    except ValueError:
        expected = f"one number, or (batch, frames) = {tuple(shape)}"
        raise ShapeError(f"{name} has shape {values.shape}; allowed is {expected}.") from None


def _summarize_times(times: Array) -> Any:
    values = np.unique(times)
    return float(values[0]) if len(values) == 1 else [round(float(v), 3) for v in values[:6]]
