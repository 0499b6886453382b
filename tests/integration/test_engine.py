"""The ONNX Runtime engine and the sampler: what they compute, what they refuse, and that they need
no torch."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

from anyflow_deploy import (
    AnyFlowError,
    BackendError,
    Schedule,
    ShapeError,
    Step,
    load_engine,
    noise,
    sample,
)
from anyflow_deploy.engines.engine import BundleEngine
from tests.conftest import Export

LATENTS = noise((1, 2, 4, 4, 6), 0)
TEXT = noise((1, 3, 32), 1)


@pytest.fixture(scope="module")
def engine(small_bundle: Export) -> BundleEngine:
    return load_engine(small_bundle("fp32", 20))


def test_the_same_inputs_give_the_same_bits(engine: BundleEngine) -> None:
    first, second = (sample(engine, LATENTS, TEXT, Schedule.uniform(3)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.dtype == np.float32 and first.shape == LATENTS.shape


def test_inputs_are_left_alone(engine: BundleEngine) -> None:
    latents = LATENTS.copy()
    sample(engine, latents, TEXT, Schedule.uniform(2))
    np.testing.assert_array_equal(latents, LATENTS)


def test_two_runs_on_one_engine_do_not_mix(engine: BundleEngine) -> None:
    alone = [
        sample(engine, noise(LATENTS.shape, seed), TEXT, Schedule.uniform(2)) for seed in (5, 6)
    ]
    with (
        engine.start(noise(LATENTS.shape, 5), TEXT) as a,
        engine.start(noise(LATENTS.shape, 6), TEXT) as b,
    ):
        for t, r in Schedule.uniform(2).transitions:
            a.step(t, r)
            b.step(t, r)
        together = [a.read(), b.read()]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_step_is_an_euler_step_along_the_velocity(engine: BundleEngine) -> None:
    with engine.start(LATENTS, TEXT) as run:
        velocity = run.velocity(900, 400)
        np.testing.assert_array_equal(run.read(), LATENTS)
        run.step(900, 400)
        np.testing.assert_allclose(
            run.read(), LATENTS - np.float32(0.5) * velocity, rtol=1e-6, atol=1e-6
        )


def test_what_was_read_does_not_change_later(engine: BundleEngine) -> None:
    with engine.start(LATENTS, TEXT) as run:
        before = run.read()
        velocity = run.velocity(1000, 500)
        copies = before.copy(), velocity.copy()
        run.step(1000, 500)
        run.step(500, 0)
        np.testing.assert_array_equal(before, copies[0])
        np.testing.assert_array_equal(velocity, copies[1])


def test_any_schedule_runs_on_one_engine(engine: BundleEngine) -> None:
    for schedule in (
        Schedule.uniform(1),
        Schedule.from_sigmas([1, 0.4]),
        Schedule.from_timesteps([700, 3]),
        Schedule.uniform(30),
    ):
        assert np.isfinite(sample(engine, LATENTS, TEXT, schedule)).all()


def test_on_step_sees_every_transition(engine: BundleEngine) -> None:
    seen: list[tuple[Step, np.ndarray]] = []
    result = sample(
        engine,
        LATENTS,
        TEXT,
        Schedule.uniform(3),
        on_step=lambda step: seen.append((step, step.read())),
    )
    assert [(s.index, s.steps, s.t, s.r) for s, _ in seen] == [
        (i, 3, t, r) for i, (t, r) in enumerate(Schedule.uniform(3).transitions)
    ]
    np.testing.assert_array_equal(seen[-1][1], result)


def test_an_exception_in_on_step_leaves_the_engine_usable(engine: BundleEngine) -> None:
    def stop(step: Step) -> None:
        raise KeyError(step.index)

    with pytest.raises(KeyError):
        sample(engine, LATENTS, TEXT, Schedule.uniform(2), on_step=stop)
    assert np.isfinite(sample(engine, LATENTS, TEXT, Schedule.uniform(2))).all()


@pytest.mark.parametrize(
    ("latents", "text", "message"),
    [
        (LATENTS[0], TEXT, r"expected \(batch, frames, channels"),
        (
            LATENTS.transpose(0, 2, 1, 3, 4),
            TEXT,
            r"latents has 2 channels on axis 2; this model takes 4",
        ),
        (
            LATENTS[:, :, :, :3],
            TEXT,
            r"height is 3, .* multiples of 2.* the nearest that fits is 4",
        ),
        (
            noise((1, 129, 4, 2, 2), 0),
            TEXT,
            r"frames is 129, .* 1 to 128.*nearest that fits is 128",
        ),
        (LATENTS, TEXT[..., :31], r"text has 31 channels on axis 2; this model takes 32"),
        (LATENTS, np.concatenate([TEXT, TEXT]), r"batch 1 and text has batch 2"),
    ],
)
def test_wrong_shapes_are_refused(
    engine: BundleEngine, latents: np.ndarray, text: np.ndarray, message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        engine.start(latents, text)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (np.zeros((1, 2, 4, 4, 6), np.int32), "int32"),
        (np.full((1, 2, 4, 4, 6), np.nan, np.float32), "NaN"),
    ],
)
def test_wrong_values_are_refused(engine: BundleEngine, latents: np.ndarray, message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        engine.start(latents, TEXT)


@pytest.mark.parametrize(
    ("t", "r"), [(400, 500), (1001, 0), (500, -1), (float("nan"), 0), ([[500, 100]], [[400, 200]])]
)
def test_times_out_of_order_are_refused(engine: BundleEngine, t: object, r: object) -> None:
    with (
        engine.start(LATENTS, TEXT) as run,
        pytest.raises(AnyFlowError, match="1000 >= t >= r >= 0"),
    ):
        run.step(t, r)


def test_times_of_the_wrong_shape_are_refused(engine: BundleEngine) -> None:
    with (
        engine.start(LATENTS, TEXT) as run,
        pytest.raises(ShapeError, match=r"\(batch, frames\) = \(1, 2\)"),
    ):
        run.step(np.full((1, 3), 500.0), 0)


def test_a_closed_run_says_so(engine: BundleEngine) -> None:
    run = engine.start(LATENTS, TEXT)
    run.close()
    with pytest.raises(AnyFlowError, match="closed"):
        run.step(500, 0)


def test_unknown_names_are_refused_with_the_nearest(small_bundle: Export) -> None:
    with pytest.raises(
        AnyFlowError, match="unknown backend 'onnxrunime'.*Did you mean 'onnxruntime'"
    ):
        load_engine(small_bundle(), backend="onnxrunime")
    with pytest.raises(AnyFlowError, match="unknown provider 'gpu': allowed are cpu, cuda"):
        load_engine(small_bundle(), provider="gpu")
    with pytest.raises(AnyFlowError, match="threads is 0"):
        load_engine(small_bundle(), threads=0)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="tests the absence of CUDA",
)
def test_a_missing_provider_is_not_replaced(small_bundle: Export) -> None:
    with pytest.raises(
        BackendError, match=r"'cuda' is not in this ONNX Runtime .*anyflow-deploy\[gpu\]"
    ):
        load_engine(small_bundle(), provider="cuda")


def test_a_provider_that_falls_back_is_refused(
    small_bundle: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime lists CUDA, cannot start it, and quietly gives the CPU: what a machine without a
    driver does."""
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    with pytest.raises(BackendError, match="fell back to CPUExecutionProvider"):
        load_engine(small_bundle(), provider="cuda")


def test_both_runtimes_installed_is_an_error(
    small_bundle: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    with pytest.raises(BackendError, match="both installed"):
        load_engine(small_bundle())


def test_bf16_is_refused_on_the_cpu(small_bundle: Export) -> None:
    bundle = small_bundle("bf16", target="h100")
    assert bundle.manifest.achieved.weight_bytes.keys() == {"F32", "BF16"}
    with pytest.raises(
        BackendError, match=r"no bf16 matrix product.*provider 'cuda'.*fp32 or fp16"
    ):
        load_engine(bundle)


def test_threads_are_the_callers_choice(small_bundle: Export) -> None:
    one, two = (
        sample(load_engine(small_bundle(), threads=n), LATENTS, TEXT, Schedule.uniform(2))
        for n in (1, 2)
    )
    # Threads split sums, depending on instructions and cache sizes.
    np.testing.assert_allclose(one, two, atol=1e-5)


GUARD = """
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        forbidden = {"torch", "diffusers", "transformers", "onnx_ir", "onnxscript", "matplotlib"}
        if name.split(".")[0] in forbidden:
            raise AssertionError(f"the engine side imported {name}")
sys.meta_path.insert(0, Guard())
from anyflow_deploy import Schedule, load_bundle, load_engine, noise, sample
engine = load_engine(load_bundle(sys.argv[1]))
latents = sample(engine, noise((1, 2, 4, 4, 6), 0), noise((1, 3, 32), 1), Schedule.uniform(2))
import anyflow_deploy.engines.validation, anyflow_deploy.engines.validation_report
import anyflow_deploy.cli.inspect_bundle
import anyflow_deploy.engines.tensorrt.lint.lint
print(float(abs(latents).mean()))
"""


def test_the_engine_side_imports_neither_torch_nor_diffusers(small_bundle: Export) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GUARD, str(small_bundle().path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0.1 < float(done.stdout) < 10


def test_the_guard_guards() -> None:
    code = GUARD.split("from anyflow_deploy import")[0] + "import torch"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode
        == 1
    )


def test_an_engine_is_not_named_to_a_backend_that_has_none(small_bundle: Export) -> None:
    with pytest.raises(BackendError, match=r"'fast' cannot run with backend.*aotinductor"):
        load_engine(small_bundle("fp32", 20), engine="fast")
