"""--deadline and --target-quality, by the command a user types; and what Ctrl-C does."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anyflow_deploy import AnyFlowError, Bundle, Schedule, load_engine, noise, sample
from anyflow_deploy.cli import options as reading
from anyflow_deploy.cli.generate import GenerateOptions, generate
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.cli.step_report import StepReport, stop_on_interrupt
from anyflow_deploy.engines.deadline import DeadlineResult
from anyflow_deploy.engines.step_policy import FirstChunkPolicy, ProgressTracker, StepSettings
from anyflow_deploy.errors import InvalidRequestError
from anyflow_deploy.pipelines import video_pipeline
from anyflow_deploy.schedule import Step
from tests.conftest import CAUSAL, Export

WORDS = ["bundle", "--prompt", "fox"]


@pytest.fixture
def small(tiny_bundle: Bundle, tmp_path: Path) -> dict[str, object]:
    """A request that needs neither text encoder nor VAE."""
    path = tmp_path / "fox.safetensors"
    save_file({"prompt_embeds": noise((1, 8, 64), 1)}, path)
    size = {"frames": 5, "height": 32, "width": 32, "output": tmp_path / "z.safetensors"}
    return {"bundle": tiny_bundle.path, "prompt_embeds": path, **size}


def latents_of(request: dict[str, object], steps: int) -> np.ndarray:
    bundle = request["bundle"]
    text = load_file(str(request["prompt_embeds"]))["prompt_embeds"]
    return sample(
        load_engine(str(bundle)), noise((1, 2, 16, 4, 4), 0), text, Schedule.uniform(steps)
    )


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("1500ms", 1.5), ("1.5s", 1.5), ("2m", 120), (".5 min", 30), ("1S", 1), ("0.25 s", 0.25)],
)
def test_lengths_of_time(given: str, seconds: float) -> None:
    assert parse_options(GenerateOptions, [*WORDS, "--deadline", given]).deadline == pytest.approx(
        seconds
    )


@pytest.mark.parametrize(
    "given", ["1500", "0s", "s", "1.5h", "1e3s", "1s 500ms", "nan s", "9" * 400 + "s"]
)
def test_no_lengths_of_time(given: str) -> None:
    with pytest.raises(AnyFlowError, match="--deadline is .*") as error:
        parse_options(GenerateOptions, [*WORDS, "--deadline", given])
    assert "1500ms, 1.5s or 2m" in str(error.value) or "finite" in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--deadline 1s --sigmas 1,0.5", "--sigmas and --deadline each decide .*give one"),
        ("--deadline 1s --target-quality 30dB", "--deadline and --target-quality each decide"),
        (
            "--target-quality 30dB --first-steps 2",
            "decided on the first chunk.*leave out --first-steps",
        ),
        ("--target-quality 30dB --steps 1", "allowed are 2 or more"),
    ],
)
def test_flags_that_contradict(flags: str, message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        generate(parse_options(GenerateOptions, [*WORDS, *flags.split()]))


def test_a_deadline_with_time_enough_makes_the_steps_it_may(
    small: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(GenerateOptions(**small, deadline="2m", steps=3)) == 0  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert (
        "3 steps, after 1 probe step to measure the speed, in 0." in said
        and "the deadline of 120 s was met with 119." in said
    )
    np.testing.assert_allclose(
        load_file(str(small["output"]))["latents"], latents_of(small, 3), atol=1e-5
    )


def test_a_deadline_without_time_is_missed_by_one_step_and_says_so(
    small: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(GenerateOptions(**small, deadline=1e-9)) == 0  # type: ignore[arg-type]
    assert (
        "1 step, in 0." in (said := capsys.readouterr().err)
        and "the deadline of 1e-09 s was missed by 0." in said
    )
    np.testing.assert_allclose(
        load_file(str(small["output"]))["latents"], latents_of(small, 1), atol=1e-5
    )


def test_every_chunk_has_the_deadline(
    export_once: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = export_once(CAUSAL)
    save_file(
        {"prompt_embeds": noise((1, 8, bundle.manifest.architecture.text_dim), 1)},
        tmp_path / "fox.safetensors",
    )
    common = {
        "bundle": bundle.path,
        "prompt_embeds": tmp_path / "fox.safetensors",
        "output": tmp_path / "z.safetensors",
    }
    size = {"frames": 25, "height": 64, "width": 64, "chunks": "1,3,3", "overwrite": True}
    assert generate(GenerateOptions(**common, **size, deadline="60s", steps=3, first_steps=2)) == 0  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert (
        "steps by chunk 2, 3, 3, after 2 probe steps to measure the speed: the deadline of 60 s a"
        " chunk was met by all" in said
    )
    assert generate(GenerateOptions(**common, **size, target_quality="30dB")) == 0  # type: ignore[arg-type]
    assert capsys.readouterr().err.count("picked ") == 1


def test_missed_deadlines_of_chunks_are_counted() -> None:
    report = StepReport(StepSettings(deadline_s=1.0), 4, 5.0)
    report.deadlines.extend(
        [
            DeadlineResult(4, True, 0.9, 1.0),
            DeadlineResult(4, False, 1.25, 1.0),
            DeadlineResult(3, False, 1.1, 1.0),
        ]
    )
    assert list(report.summary_lines()) == [
        "steps by chunk 4, 4, 3, after 1 probe step to measure the speed: the deadline of 1 s a"
        " chunk was missed by 2 of 3, by 0.250 s at most."
    ]


def test_a_quality_says_what_it_picked_and_what_it_cost(
    small: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(GenerateOptions(**small, target_quality="29dB")) == 0  # type: ignore[arg-type]
    said = capsys.readouterr().err
    steps = int(said.split("picked ")[1].split()[0])
    assert (
        steps >= 4
        and f"; {steps - 1} transitions more than a video of {steps} steps needs." in said
    )
    np.testing.assert_array_equal(
        load_file(str(small["output"]))["latents"], latents_of(small, steps)
    )


def test_a_quality_out_of_reach_is_a_warning(
    small: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(GenerateOptions(**small, target_quality="90", steps=5)) == 0  # type: ignore[arg-type]
    assert (
        "warning: 90 dB were not reached: " in (said := capsys.readouterr().err)
        and "4 steps; --steps allows 5." in said
    )


# Ctrl-C


def test_the_first_interrupt_finishes_with_one_jump(
    small: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Step] = []

    def interrupted(*args: object, on_step: object, **kwargs: object) -> np.ndarray:
        def on(step: Step) -> None:
            seen.append(step)
            on_step(step)  # type: ignore[operator]
            if step.index == 1:
                os.kill(os.getpid(), signal.SIGINT)

        return sample(*args, on_step=on, **kwargs)  # type: ignore[arg-type]

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(video_pipeline, "sample", interrupted)
    assert generate(GenerateOptions(**small, deadline="10m", steps=1000)) == 0  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert [step.r == 0.0 for step in seen] == [False, False, True]
    assert (
        "finishing with a single step; press Ctrl-C again to interrupt." in said
        and "3 steps, after 1 probe step" in said
    )
    assert Path(str(small["output"])).is_file() and signal.getsignal(signal.SIGINT) is before


def test_the_second_interrupt_interrupts() -> None:
    enough = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def twice() -> None:
        with stop_on_interrupt(enough):
            os.kill(os.getpid(), signal.SIGINT)
            assert enough.wait(60)
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(60)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_leaves_signals_alone() -> None:
    def work() -> None:
        with stop_on_interrupt(threading.Event()):
            seen.append(signal.getsignal(signal.SIGINT))

    seen: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


@pytest.mark.parametrize(
    ("stop", "line"),
    [
        (KeyboardInterrupt(), "interrupted; nothing half-written was left."),
        (KeyboardInterrupt("a.mp4 holds 13 frames"), "interrupted; a.mp4 holds 13 frames."),
    ],
)
def test_the_closing_line_of_an_interrupt_is_true(
    stop: KeyboardInterrupt,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(options: GenerateOptions) -> int:
        raise stop

    monkeypatch.setattr("sys.argv", ["anyflow-generate", *WORDS])
    with pytest.raises(SystemExit) as ended:
        reading.run("anyflow-generate", GenerateOptions, work)
    assert ended.value.code == reading.INTERRUPTED and capsys.readouterr().err.strip() == line


# The policies themselves


def test_settings_make_the_policy_they_say() -> None:
    assert StepSettings().make_policy(4, 5.0) == Schedule.uniform(4)
    assert StepSettings(sigmas=(1.0, 0.5)).make_policy(4, 5.0) == Schedule.from_sigmas([1, 0.5])
    policy = StepSettings(num_inference_steps=2, first_steps=8, shift=1.0).make_policy(4, 5.0)
    assert policy == FirstChunkPolicy(Schedule.uniform(8, 1.0), Schedule.uniform(2, 1.0))
    assert [policy.for_chunk(index) for index in (0, 1, 2)] == [
        Schedule.uniform(steps, 1.0) for steps in (8, 2, 2)
    ]


def test_settings_that_contradict_are_refused_in_the_callers_words() -> None:
    with pytest.raises(
        InvalidRequestError, match="deadline_s and target_psnr each decide"
    ) as error:
        StepSettings(deadline_s=1.0, target_psnr=30.0).check()
    assert error.value.param == "deadline_s"


def test_progress_of_chunks_never_turns_back() -> None:
    tracker = ProgressTracker(2)
    walk = [(0, 4), (1, 8), (2, 3), (0, 2), (1, 2)]
    shares = [tracker.update(Step(i, n, 0, 0, lambda: np.zeros(1))) for i, n in walk]
    assert shares == [0.125, 0.125, 0.5, 0.75, 1.0]
