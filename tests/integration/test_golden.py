"""The oracle: what the authors' own code computed, through the exported ONNX in ONNX Runtime, not
only the module."""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from anyflow_deploy import Schedule, load_engine, sample
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.engines.validation import THRESHOLDS
from anyflow_deploy.export.diffusers_engine import DiffusersEngine
from anyflow_deploy.model.transformer import FlowMapTransformer, constants
from tests.conftest import GOLDEN, Export

Golden = dict[str, NDArray[np.float32]]

FLOAT32 = 1e-5
# 6e-5 was measured on the golden set of this repository.
HALF = THRESHOLDS["fp16"].transition if "ANYFLOW_GOLDEN" in os.environ else 5e-4
STEPS = (1, 2, 4, 8, 13)
TIMES = [
    ("timestep", "r_timestep", "velocity"),
    ("timestep_per_frame", "r_timestep_per_frame", "velocity_per_frame"),
]
BUNDLES = [("fp32", 20, FLOAT32), ("fp32", 23, FLOAT32), ("fp16", 20, HALF), ("fp16", 23, HALF)]


@pytest.mark.parametrize(("t", "r", "velocity"), TIMES)
@pytest.mark.parametrize(("precision", "opset", "limit"), BUNDLES)
def test_velocities_through_onnx_runtime(
    golden: Golden,
    golden_bundle: Export,
    precision: str,
    opset: int,
    limit: float,
    t: str,
    r: str,
    velocity: str,
) -> None:
    engine = load_engine(golden_bundle(precision, opset))
    with engine.start(golden["latents"], golden["text"]) as run:
        assert difference(run.velocity(golden[t], golden[r]), golden[velocity]).relative_l2 < limit


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("precision", "opset", "limit"), BUNDLES)
def test_samples_through_onnx_runtime(
    golden: Golden, golden_bundle: Export, precision: str, opset: int, limit: float, steps: int
) -> None:
    engine = load_engine(golden_bundle(precision, opset))
    latents = sample(engine, golden["latents"], golden["text"], Schedule.uniform(steps))
    assert difference(latents, golden[f"sample_{steps}"]).relative_l2 < limit


@pytest.mark.parametrize("steps", STEPS)
def test_schedules(golden: Golden, steps: int) -> None:
    np.testing.assert_allclose(
        Schedule.uniform(steps).timesteps, golden[f"schedule_{steps}"], rtol=1e-6
    )


@pytest.mark.parametrize("fused", [False, True])
def test_the_module_itself(golden: Golden, fused: bool) -> None:
    checkpoint = open_checkpoint(GOLDEN)
    module = FlowMapTransformer(checkpoint.architecture, fused=fused)
    parameters = {name: checkpoint.read(name) for name in checkpoint.shapes()}
    module.load_state_dict(parameters, assign=True)
    for name, value in constants(checkpoint.architecture).items():
        module.get_buffer(name).copy_(value)
    inputs = [
        torch.from_numpy(golden[key]) for key in ("latents", "timestep", "r_timestep", "text")
    ]
    with torch.no_grad():
        z_r, velocity = module(*inputs)
    assert difference(velocity.numpy(), golden["velocity"]).relative_l2 < FLOAT32
    interval = (inputs[1] - inputs[2])[:, :, None, None, None] / 1000
    torch.testing.assert_close(z_r, inputs[0] - interval * velocity)


def test_the_pytorch_reference(golden: Golden) -> None:
    engine = DiffusersEngine(open_checkpoint(GOLDEN))
    with engine.start(golden["latents"], golden["text"]) as run:
        velocity = run.velocity(golden["timestep_per_frame"], golden["r_timestep_per_frame"])
    assert difference(velocity, golden["velocity_per_frame"]).relative_l2 < FLOAT32
    latents = sample(engine, golden["latents"], golden["text"], Schedule.uniform(4))
    assert difference(latents, golden["sample_4"]).relative_l2 < FLOAT32


@pytest.mark.parametrize("opset", [20, 23])
def test_the_bundle_runs_as_it_stands(golden: Golden, golden_bundle: Export, opset: int) -> None:
    """The file on disk, opened by plain ONNX Runtime with no help from us, computes the same."""
    session = onnxruntime.InferenceSession(
        golden_bundle("fp32", opset).path / "transition.onnx", providers=["CPUExecutionProvider"]
    )
    feed = {"latents": "latents", "t": "timestep", "r": "r_timestep", "text": "text"}
    outputs = session.run(["velocity", "z_r"], {name: golden[key] for name, key in feed.items()})
    assert difference(outputs[0], golden["velocity"]).relative_l2 < FLOAT32
    interval = (golden["timestep"] - golden["r_timestep"])[:, :, None, None, None] / 1000
    np.testing.assert_allclose(
        outputs[1], golden["latents"] - interval * golden["velocity"], atol=1e-5
    )
