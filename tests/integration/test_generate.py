"""From a prompt to an mp4, by the commands a user types."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AnyFlowPipeline
from numpy.typing import NDArray
from safetensors.numpy import load_file

from anyflow_deploy import (
    AnyFlowError,
    Bundle,
    CheckpointError,
    Schedule,
    load_engine,
    noise,
    sample,
)
from anyflow_deploy.cli.generate import GenerateOptions, generate
from anyflow_deploy.pipelines.text_encoder import encode_prompts, load_embeddings
from anyflow_deploy.pipelines.vae import decode_video
from anyflow_deploy.pipelines.video_io import VideoWriter, save_video
from anyflow_deploy.pipelines.video_pipeline import VideoPipeline
from anyflow_deploy.serving.generator import VideoGenerator
from tests.fakes.serving import serving

PROMPT = "a red fox runs in the snow"


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.average_rate == 16
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_prompt_becomes_a_video(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "fox.mp4"
    assert (
        generate(GenerateOptions(bundle=tiny_bundle.path, prompt=PROMPT, steps=2, output=output))
        == 0
    )
    assert frames_of(output).shape == (17, 64, 96, 3)
    said = capsys.readouterr().err
    assert all(stage in said for stage in ("text", "engine", "2 steps", "VAE", "file"))
    assert [p.name for p in tmp_path.iterdir()] == ["fox.mp4"]


def test_the_video_is_the_pipelines(tiny_bundle: Bundle, tiny_pipeline: Path) -> None:
    """Text, sampling and decoding together equal diffusers' own pipeline from the same noise."""
    latents = noise((1, 2, 16, 4, 6), 5)
    words = encode_prompts(tiny_pipeline, [PROMPT], 512)
    ours = decode_video(
        tiny_pipeline, sample(load_engine(tiny_bundle), latents, words, Schedule.uniform(4))
    )
    pipe = AnyFlowPipeline.from_pretrained(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    start = torch.from_numpy(latents).permute(0, 2, 1, 3, 4)
    theirs = pipe(
        PROMPT, height=32, width=48, num_frames=5, num_inference_steps=4, latents=start
    ).frames
    assert np.abs(ours.astype(int) - np.round(theirs * 255).astype(int)).max() <= 1


def test_saved_embeddings_stand_in_for_the_text_encoder(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    embeddings = tmp_path / "fox.safetensors"
    common = {"bundle": tiny_bundle.path, "steps": 1, "frames": 5, "height": 32, "width": 32}
    first = tmp_path / "a.safetensors"
    second = tmp_path / "b.safetensors"
    assert (
        generate(
            GenerateOptions(prompt=PROMPT, save_prompt_embeds=embeddings, output=first, **common)
        )
        == 0
    )
    assert load_embeddings(embeddings)[1] == [PROMPT]
    assert (
        generate(
            GenerateOptions(
                prompt_embeds=embeddings, output=second, pipeline=str(tmp_path), **common
            )
        )
        == 0
    )
    np.testing.assert_array_equal(load_file(first)["latents"], load_file(second)["latents"])
    assert load_file(first)["latents"].shape == (1, 2, 16, 4, 4)


def test_the_seed_decides_the_noise(tiny_bundle: Bundle, tmp_path: Path) -> None:
    outputs = []
    for index, seed in enumerate((1, 1, 2)):
        path = tmp_path / f"{index}.safetensors"
        generate(
            GenerateOptions(
                bundle=tiny_bundle.path,
                prompt=PROMPT,
                steps=1,
                frames=1,
                height=16,
                width=16,
                seed=seed,
                output=path,
            )
        )
        outputs.append(load_file(path)["latents"])
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 0.1


def test_your_own_sigmas(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "z.safetensors"
    generate(
        GenerateOptions(
            bundle=tiny_bundle.path,
            prompt=PROMPT,
            sigmas="1,0.5",
            frames=1,
            height=16,
            width=16,
            output=path,
        )
    )
    words = encode_prompts(Path(tiny_bundle.manifest.source.location), [PROMPT], 512)
    wanted = sample(
        load_engine(tiny_bundle), noise((1, 1, 16, 2, 2), 0), words, Schedule.from_sigmas([1, 0.5])
    )
    np.testing.assert_array_equal(load_file(path)["latents"], wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 18}, r"frames is 18; allowed are 4n\+1.*nearest is 17"),
        ({"height": 100}, "height is 100; allowed are multiples of 16. The nearest is 96"),
        ({"frames": 1025}, "frames is 257, but this bundle declares frames 1 to 256"),
        ({"prompt": None}, "give one of --prompt TEXT, --prompts FILE and --prompt-embeds FILE"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "fox " * 600}, r"the prompt has 601 tokens and the model takes 512"),
        ({"output": Path("video.avi")}, "ends in .avi; allowed are .mp4"),
        ({"sigmas": (1.0, 0.5), "steps": 2}, "--sigmas is the whole schedule"),
        ({"sigmas": (0.5, 1.0), "steps": None}, "timesteps must fall"),
        (
            {"prompt": None, "prompt_embeds": Path("none.safetensors")},
            "none.safetensors cannot be read: No such file",
        ),
    ],
)
def test_bad_requests_are_refused(
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AnyFlowError, match=message):
        generate(
            GenerateOptions(**{"bundle": tiny_bundle.path, "prompt": PROMPT, "steps": 1, **changes})
        )
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked(tiny_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_text("mine")
    with pytest.raises(AnyFlowError, match="video.mp4 exists.*--overwrite"):
        generate(
            GenerateOptions(bundle=tiny_bundle.path, prompt=PROMPT, output=tmp_path / "video.mp4")
        )
    assert (tmp_path / "video.mp4").read_text() == "mine"


def test_a_bundle_without_a_pipeline_says_what_to_give(
    small_bundle: object, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="Give --pipeline DIR.*--prompt-embeds FILE"):
        generate(
            GenerateOptions(
                bundle=small_bundle().path,
                prompt=PROMPT,
                output=tmp_path / "video.mp4",
                height=32,
                width=32,
            )
        )  # type: ignore[operator]


def test_a_video_that_cannot_be_encoded_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AnyFlowError, match="could not be encoded"):
        save_video(tmp_path / "odd.mp4", np.zeros((2, 15, 15, 3), np.uint8), 16)
    assert list(tmp_path.iterdir()) == []


def test_the_tiny_pipeline_is_the_same_every_time(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Made by the command, after other random numbers were drawn, in another process."""
    subprocess.run(
        [sys.executable, "-m", "anyflow_deploy.checkpoints.tiny", str(tmp_path / "again")],
        check=True,
        capture_output=True,
    )
    names = sorted(p.relative_to(tiny_pipeline) for p in tiny_pipeline.rglob("*") if p.is_file())
    assert len(names) == 10
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tiny_pipeline / name).read_bytes(), name


def test_the_tiny_pipeline_is_never_written_over(tiny_pipeline: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "anyflow_deploy.checkpoints.tiny", str(tiny_pipeline)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "is not empty" in done.stderr


def test_a_served_video_is_decoded_in_pieces_and_is_the_same(
    tiny_bundle: Bundle, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[NDArray[np.uint8]] = []
    append = VideoWriter.append
    monkeypatch.setattr(
        VideoWriter, "append", lambda self, frames: (pieces.append(frames), append(self, frames))[1]
    )
    with VideoPipeline(tiny_bundle) as pipe:
        with serving(VideoGenerator(pipe), tmp_path, tiny_bundle.manifest) as server:
            video = server.create_and_wait(
                prompt=PROMPT, num_frames=17, size="96x64", num_inference_steps=2, seed=3
            )
        assert (video["status"], video["steps"], video["chunks"]) == ("completed", [2], 2)
        whole = sample(
            pipe.engine,
            noise((1, 5, 16, 8, 12), 3),
            pipe.encode_prompt(PROMPT),
            Schedule.uniform(2),
        )
    np.testing.assert_array_equal(np.concatenate(pieces), decode_video(tiny_pipeline, whole)[0])
