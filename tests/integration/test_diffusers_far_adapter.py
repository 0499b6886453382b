"""Drop-in: diffusers' own AnyFlowFARPipeline on our causal engine.

Sizes are chosen so that every token count is a multiple of 128: only there is diffusers' class
right, and comparable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnyFlowFARPipeline

from anyflow_deploy import AnyFlowError, load_engine
from anyflow_deploy.pipelines.diffusers import EngineFARTransformer
from tests.conftest import Export

SIZE: dict[str, Any] = {
    "height": 256,
    "width": 256,
    "num_frames": 29,
    "chunk_partition": [2, 2, 2, 2],
    "output_type": "latent",
}
Pair = tuple[AnyFlowFARPipeline, AnyFlowFARPipeline]


@pytest.fixture(scope="module")
def pair(export_once: Export, far_pipeline: Path) -> Pair:
    """diffusers on its own transformer, and on our engine."""
    theirs, ours = (AnyFlowFARPipeline.from_pretrained(far_pipeline) for _ in range(2))
    ours.transformer = EngineFARTransformer(load_engine(export_once(far_pipeline)))
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    return theirs, ours


def call(pipe: AnyFlowFARPipeline, **changes: Any) -> np.ndarray:
    return np.asarray(
        pipe(
            generator=torch.Generator().manual_seed(7),
            **{**SIZE, "num_inference_steps": 1, **changes},
        ).frames
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a red fox"},
        {"prompt": "a red fox", "num_inference_steps": 2},
        {"prompt": ["a red fox", "rain in the city"]},
        {
            "prompt": "a red fox",
            "video_latents": torch.randn(
                1, 2, 16, 32, 32, generator=torch.Generator().manual_seed(1)
            ),
        },
        {
            "prompt": "a red fox",
            "video": torch.rand(1, 5, 3, 256, 256, generator=torch.Generator().manual_seed(1)),
        },
        {"prompt": "a red fox", "num_frames": 13, "chunk_partition": [2, 2]},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_calls_agree(pair: Pair, changes: dict[str, Any]) -> None:
    theirs, ours = (call(pipe, **changes) for pipe in pair)
    assert theirs.shape == ours.shape
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-5


def test_a_call_leaves_nothing_behind_for_the_next(pair: Pair) -> None:
    first = call(pair[1], prompt="a red fox")
    call(pair[1], prompt="rain", num_frames=13, chunk_partition=[2, 2])
    np.testing.assert_array_equal(call(pair[1], prompt="a red fox"), first)


def test_what_cannot_be_done_is_refused(pair: Pair) -> None:
    with pytest.raises(AnyFlowError, match="use_kv_cache=True"):
        call(pair[1], prompt="a red fox", use_kv_cache=False)
