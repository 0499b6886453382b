"""One way from a prompt to a video: `VideoPipeline`, and what it refuses before anything is
loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from anyflow_deploy import AdaptiveSteps, AnyFlowError, Bundle, Deadline, Schedule, noise
from anyflow_deploy.cli.generate import GenerateOptions, generate
from anyflow_deploy.engines.deadline import DeadlineResult
from anyflow_deploy.engines.step_policy import StepSettings
from anyflow_deploy.errors import InvalidRequestError
from anyflow_deploy.pipelines import video_pipeline
from anyflow_deploy.pipelines.request import GenerationRequest, check_prompt_embeds
from anyflow_deploy.pipelines.text_encoder import PromptEncoder
from anyflow_deploy.pipelines.vae import encode_video
from anyflow_deploy.pipelines.video import Video
from anyflow_deploy.pipelines.video_io import load_video
from anyflow_deploy.pipelines.video_pipeline import VideoPipeline
from tests.fakes.serving import fake_manifest

PROMPT = "a red fox runs in the snow"
SIZE: dict[str, Any] = {"num_frames": 17, "height": 32, "width": 32}


def embeds_of(bundle: Bundle) -> NDArray[np.float32]:
    return noise((1, 8, bundle.manifest.architecture.text_dim), 1)


def command(bundle: Bundle, output: Path, **changes: object) -> NDArray[np.float32]:
    """The latents that `anyflow-generate` writes."""
    common = {"bundle": bundle.path, "frames": 17, "height": 32, "width": 32, "output": output}
    assert generate(GenerateOptions(**{**common, **changes})) == 0  # type: ignore[arg-type]
    return load_file(output)["latents"]


def test_a_call_makes_what_the_command_makes(tiny_bundle: Bundle, tmp_path: Path) -> None:
    wanted = command(tiny_bundle, tmp_path / "z.safetensors", prompt=PROMPT, steps=2, seed=3)
    with VideoPipeline.from_bundle(tiny_bundle.path) as pipe:
        video = pipe(PROMPT, num_inference_steps=2, seed=3, **SIZE)
    np.testing.assert_array_equal(video.latents, wanted)
    assert video.frames is not None and video.frames.shape == (17, 32, 32, 3)
    assert video.frames.dtype == np.uint8 and video.fps == 16
    assert video.report is not None and video.report.steps == (2,)
    assert set(video.report.seconds) == {"text", "engine", "transformer", "vae"}


def test_a_causal_call_makes_what_the_command_makes(far_bundle: Bundle, tmp_path: Path) -> None:
    save_file({"prompt_embeds": embeds_of(far_bundle)}, tmp_path / "fox.safetensors")
    wanted = command(
        far_bundle,
        tmp_path / "z.safetensors",
        prompt_embeds=tmp_path / "fox.safetensors",
        chunks=(1, 3, 1),
        steps=2,
        first_steps=3,
    )
    pipe = VideoPipeline(far_bundle)
    options = {**SIZE, "num_inference_steps": 2, "first_steps": 3, "chunks": (1, 3, 1)}
    video = pipe(prompt_embeds=embeds_of(far_bundle), output_type="latent", **options)
    np.testing.assert_array_equal(video.latents, wanted)
    assert video.frames is None and video.report is not None and video.report.steps == (3, 2, 2)


@pytest.mark.parametrize("name", ["tiny_bundle", "far_bundle"])
def test_a_stream_is_the_call_in_parts(name: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(name)
    options = {**SIZE, "prompt_embeds": embeds_of(bundle), "num_inference_steps": 1}
    with VideoPipeline.from_bundle(bundle) as pipe:
        whole = pipe(**options)
        chunks = list(pipe.stream(**options))
    assert len(chunks) > 1 and [chunk.index for chunk in chunks] == list(range(len(chunks)))
    ends = np.cumsum([0, *[len(chunk.frames) for chunk in chunks if chunk.frames is not None]])
    assert [chunk.first_frame for chunk in chunks] == list(ends[:-1]) and ends[-1] == 17
    np.testing.assert_array_equal(np.concatenate([c.latents for c in chunks], 1), whole.latents)
    frames = np.concatenate([chunk.frames for chunk in chunks if chunk.frames is not None])
    np.testing.assert_array_equal(frames, whole.frames)


def test_a_stream_that_is_left_serves_the_next(far_bundle: Bundle) -> None:
    options = {**SIZE, "prompt_embeds": embeds_of(far_bundle), "output_type": "latent"}
    with VideoPipeline(far_bundle) as pipe:
        first = next(pipe.stream(num_inference_steps=1, **options))
        again = next(pipe.stream(num_inference_steps=1, **options))
    np.testing.assert_array_equal(first.latents, again.latents)


def test_a_video_begins_with_a_picture(far_bundle: Bundle, far_pipeline: Path) -> None:
    picture = np.full((32, 32, 3), 200, np.uint8)
    options = {**SIZE, "prompt_embeds": embeds_of(far_bundle), "num_inference_steps": 1}
    with VideoPipeline(far_bundle) as pipe:
        chunks = list(pipe.stream(image=picture, chunks=(1, 3, 1), **options))
        video = pipe(image=picture, chunks=(1, 3, 1), **options)
    assert [chunk.given for chunk in chunks] == [True, False, False]
    np.testing.assert_array_equal(chunks[0].latents, encode_video(far_pipeline, picture[None]))
    assert video.report is not None and video.report.steps == (1, 1)


def test_the_callback_is_called_after_each_transition(tiny_bundle: Bundle) -> None:
    seen: list[tuple[int, float, tuple[int, ...]]] = []
    with VideoPipeline(tiny_bundle) as pipe:

        def on_step_end(given: VideoPipeline, index: int, t: float, more: dict[str, Any]) -> None:
            assert given is pipe
            seen.append((index, t, more["step"].read().shape))

        options = {**SIZE, "prompt_embeds": embeds_of(tiny_bundle), "output_type": "latent"}
        pipe(num_inference_steps=3, callback_on_step_end=on_step_end, **options)
        times = [t for t, _ in Schedule.uniform(3, tiny_bundle.manifest.schedule.shift).transitions]
        assert seen == [(index, t, (1, 5, 16, 4, 4)) for index, t in enumerate(times)]
        with pytest.raises(AnyFlowError, match="cannot be replaced between steps"):
            pipe(callback_on_step_end=lambda *_: {"latents": 0}, **options)


def test_every_policy_decides_the_steps(tiny_bundle: Bundle) -> None:
    options = {**SIZE, "prompt_embeds": embeds_of(tiny_bundle), "output_type": "latent"}
    with VideoPipeline(tiny_bundle) as pipe:
        two = pipe(policy=Schedule.uniform(2), **options)
        late = pipe(deadline_s=1e-9, **options)
        adapted = pipe(policy=AdaptiveSteps(1.0), **options)
        searched = pipe(target_psnr=1.0, **options)
        pipe(policy=Deadline(60, max_steps=2), **options)
        counted = pipe(num_inference_steps=2, shift=5.0, **options)
    np.testing.assert_array_equal(two.latents, counted.latents)
    np.testing.assert_array_equal(adapted.latents, searched.latents)
    assert late.report is not None and isinstance(late.report.results[0], DeadlineResult)
    assert searched.report is not None and searched.report.results[0].steps == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "give one of prompt and prompt_embeds"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "fox " * 600}, "has 601 tokens and the model takes 512"),
        ({"num_frames": 18}, r"frames is 18; allowed are 4n\+1"),
        ({"num_frames": 4.5}, "num_frames is 4.5; allowed are whole numbers"),
        ({"height": 100}, "height is 100; allowed are multiples of 16"),
        ({"seed": -1}, "seed is -1"),
        ({"num_inference_steps": 0}, "allowed are whole numbers from 1 to 1000"),
        ({"num_inference_steps": 1001}, "allowed are whole numbers from 1 to 1000"),
        ({"deadline_s": 0}, "allowed is any positive number"),
        ({"deadline_s": 1, "target_psnr": 30}, "deadline_s and target_psnr each decide"),
        ({"policy": Schedule.uniform(2), "shift": 3}, "policy decides the steps alone"),
        ({"output_type": "pil"}, "output_type is 'pil'"),
        ({"chunks": (1, 3)}, "chunks is for causal models, and 'tiny' is bidirectional"),
        ({"image": np.zeros((32, 32, 3), np.uint8)}, "image is for causal models"),
        (
            {"prompt": None, "prompt_embeds": np.zeros((3, 3), np.float32)},
            "prompt_embeds has shape",
        ),
        ({"prompt": None, "prompt_embeds": np.zeros((2, 8, 64), np.float32)}, "are of 2 videos"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_loaded(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(
        video_pipeline, "load_engine", lambda *_, **__: pytest.fail("the engine was loaded")
    )
    pipe = VideoPipeline(tiny_bundle)
    with pytest.raises(AnyFlowError, match=message):
        pipe.stream(**{"prompt": PROMPT, **SIZE, **changes})


def test_a_pipeline_without_its_parts_is_refused_first(tiny_bundle: Bundle, tmp_path: Path) -> None:
    pipe = VideoPipeline(tiny_bundle, pipeline=tmp_path)
    with pytest.raises(AnyFlowError, match="tokenizer and text_encoder"):
        pipe.stream(PROMPT)
    with pytest.raises(AnyFlowError, match="needs vae of the model's pipeline"):
        pipe.stream(prompt_embeds=embeds_of(tiny_bundle))


def test_the_embeddings_of_a_prompt_are_made_once(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VideoPipeline(tiny_bundle) as pipe:
        first = pipe.encode_prompt(PROMPT)
        monkeypatch.setattr(PromptEncoder, "encode", lambda *_: pytest.fail("encoded twice"))
        assert pipe.encode_prompt(PROMPT) is first and first.dtype == np.float32
    with pytest.raises(AnyFlowError, match="this pipeline is closed"):
        pipe(PROMPT)


def test_a_video_is_saved_whole_or_not_at_all(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SIZE, "prompt_embeds": embeds_of(tiny_bundle), "num_inference_steps": 1}
    with VideoPipeline(tiny_bundle) as pipe:
        video = pipe(**options)
    video.save(tmp_path / "fox.mp4")
    video.save(str(tmp_path / "fox.safetensors"))
    assert load_video(tmp_path / "fox.mp4").shape == (17, 32, 32, 3)
    np.testing.assert_array_equal(load_file(tmp_path / "fox.safetensors")["latents"], video.latents)
    before = (tmp_path / "fox.mp4").read_bytes()

    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("anyflow_deploy.pipelines.video_io._encode", broken)
    with pytest.raises(OSError, match="no space left"):
        video.save(tmp_path / "fox.mp4")
    assert (tmp_path / "fox.mp4").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fox.mp4", "fox.safetensors"]
    with pytest.raises(AnyFlowError, match="these are latents alone"):
        Video(None, video.latents, 16).save(tmp_path / "none.mp4")


BARE = """
import sys
import numpy as np
class Bare:
    def find_spec(self, name, path=None, target=None):
        if (top := name.split(".")[0]) in {"torch", "diffusers", "transformers", "av"}:
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)
sys.meta_path.insert(0, Bare())
from anyflow_deploy.pipelines.video_pipeline import VideoPipeline
embeds = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
with VideoPipeline.from_bundle(sys.argv[1]) as pipe:
    pipe(prompt_embeds=embeds, num_inference_steps=1, num_frames=5, height=32, width=32,
         output_type="latent").save(sys.argv[2])
"""


def test_latents_of_saved_embeddings_need_neither_torch_nor_diffusers(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    output = tmp_path / "z.safetensors"
    words = [sys.executable, "-c", BARE, str(tiny_bundle.path), str(output)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert load_file(output)["latents"].shape == (1, 2, 16, 4, 4)


# The request


def test_a_request_knows_its_latents_and_chunks() -> None:
    request = GenerationRequest.from_manifest(fake_manifest("far-tiny"), num_frames=41, window=2)
    assert request.shape[0] == 11 and request.plan is not None
    assert sum(request.plan.chunks) == 11 and request.plan.window == 2
    assert (request.num_samples, request.height, request.width) == (
        len(request.plan.chunks),
        32,
        48,
    )
    by_chunks = GenerationRequest.from_manifest(fake_manifest("far-tiny"), chunks=(1, 2))
    assert by_chunks.num_frames == 9 and by_chunks.check_context(1) == 1


def test_a_request_blames_the_field_in_the_callers_words() -> None:
    manifest = fake_manifest("tiny")
    for changes, param in (
        ({"num_frames": 18}, "num_frames"),
        ({"height": 33}, "size"),
        ({"window": 1}, "window"),
        ({"steps": StepSettings(first_steps=2)}, "first_steps"),
        ({"seed": True}, "seed"),
    ):
        with pytest.raises(InvalidRequestError) as error:
            GenerationRequest.from_manifest(manifest, **changes)  # type: ignore[arg-type]
        assert error.value.param == param
    with pytest.raises(InvalidRequestError, match="--window is for causal models"):
        GenerationRequest.from_manifest(manifest, window=1, name=lambda field: f"--{field}")


def test_prompt_embeds_of_one_video_may_lack_the_batch() -> None:
    manifest = fake_manifest("tiny")
    width = manifest.architecture.text_dim
    assert check_prompt_embeds(manifest, np.zeros((7, width), np.float32)).shape == (1, 7, width)
