"""An order becomes clean latents, piece by piece, for every server."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing

from anyflow_deploy.engines.engine import Array, Engine
from anyflow_deploy.engines.sampler import noise, sample, stream
from anyflow_deploy.engines.step_policy import StepPolicy
from anyflow_deploy.schedule import Step
from anyflow_deploy.serving.request import Order

PIECE = 3
"""Latent frames of a bidirectional video that are decoded together."""


def clean_latents(
    engine: Engine, order: Order, words: Array, policy: StepPolicy, on_step: Callable[[Step], None]
) -> Generator[Array, None, None]:
    """A causal model's chunks, each before the next is begun; of a bidirectional model all at once, handed out in pieces.

    Args:
        engine: of the bundle that the order was checked against.
        order: from `ordered`.
        words: the prompt's embeddings, float32 (1, L, D).
        policy: from `Order.policy`.
        on_step: called after each transition; what it raises ends the video.

    Returns:
        An iterator over float32 (1, f, C, H, W). Closing it at any moment releases the cache.
    """
    start = noise((1, *order.shape), order.seed)
    if order.plan is None:
        latents = sample(engine, start, words, policy, on_step)
        for first in range(0, latents.shape[1], PIECE):
            yield latents[:, first : first + PIECE]
        return
    plan = order.plan
    with closing(stream(engine, start, words, policy, plan.chunks, None, plan.window, on_step)) as chunks:
        for chunk in chunks:
            yield chunk.latents
