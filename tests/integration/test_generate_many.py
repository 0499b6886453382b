"""Many prompts and seeds in one run of `anyflow-generate`: what it writes, loads and says."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from anyflow_deploy import AnyFlowError, Bundle, Schedule, load_engine, noise, sample
from anyflow_deploy.cli.generate import generate
from anyflow_deploy.cli.generate_options import GenerateOptions
from anyflow_deploy.cli.options import parse_options, run
from anyflow_deploy.cli.video_list import list_videos, make_slug
from anyflow_deploy.engines.engine import Array
from anyflow_deploy.errors import OutputError
from anyflow_deploy.pipelines import pipeline_parts, text_encoder, video_pipeline
from anyflow_deploy.pipelines.text_encoder import encode_prompts, load_embeddings, save_embeddings
from tests.json_reference import documented_fields

SMALL = ["--frames", "1", "--height", "16", "--width", "16", "--steps", "2"]


def listed(*words: str) -> list[tuple[int, str | None, int, str]]:
    videos = list_videos(parse_options(GenerateOptions, ["b", *words]))
    return [(v.index, v.prompt, v.seed, str(v.output)) for v in videos]


def test_every_prompt_is_made_with_every_seed(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeffA red fox!\r\n\r\n  das Meer\u2028bei Nacht \n".encode())
    words = ["--prompts", str(prompts), "--seeds", "7,0", "--output", "{seed}/{index}-{prompt}.mp4"]
    assert listed(*words) == [
        (1, "A red fox!", 7, "7/1-a-red-fox.mp4"),
        (2, "A red fox!", 0, "0/2-a-red-fox.mp4"),
        (3, "das Meer\u2028bei Nacht", 7, "7/3-das-meer-bei-nacht.mp4"),
        (4, "das Meer\u2028bei Nacht", 0, "0/4-das-meer-bei-nacht.mp4"),
    ]
    prompts.write_text("a\n" * 10)
    names = [name for *_, name in listed("--prompts", str(prompts), "--output", "{index}.mp4")]
    assert names[0] == "01.mp4" and names == sorted(names)


def test_one_video_has_placeholders_too() -> None:
    one = listed("--prompt", "a/../b", "--seed", "5", "--output", "x{y}-{seed}-{prompt}.mp4")
    assert one == [(1, "a/../b", 5, "x{y}-5-a-b.mp4")]
    assert listed("--prompt-embeds", "e", "--output", "{index}.mp4")[0][3] == "1.mp4"


def test_a_slug_is_a_name_on_every_file_system() -> None:
    assert make_slug("  ...  ") == "prompt"
    assert make_slug("Ein  Hund,\tüber_morgen") == "ein-hund-über-morgen"
    assert len(make_slug("狐" * 300).encode()) <= 120 and set(make_slug("狐" * 300)) == {"狐"}
    assert make_slug("x" * 300) == "x" * 40


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--prompt a --seeds 1,2",
            r"makes 2 videos.*gives 2 of them the name .*as video-\{index\}",
        ),
        ("--prompt a --seeds 1,1 --output {index}.mp4", "--seeds has 1 twice"),
        ("--prompt a --seeds 1 --seed 1", "give one of --seed N and --seeds"),
        ("--prompt a --prompts p.txt", "give one of --prompt TEXT, --prompts FILE and"),
        ("--prompts none.txt", r"none.txt cannot be read: No such file.*one prompt a line"),
        ("--prompt-embeds e --output {prompt}.mp4", "has no prompt to name it by"),
        (
            "--prompt a --seeds 1,2 --output {seed}.safetensors --save-prompt-embeds 2.safetensors",
            "--output and --save-prompt-embeds are both 2.safetensors",
        ),
    ],
)
def test_wrong_lists_are_refused(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AnyFlowError, match=message):
        generate(parse_options(GenerateOptions, ["no-bundle", *words.split()]))
    assert list(tmp_path.iterdir()) == []


def test_every_output_is_tried_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "3.mp4").write_text("mine")
    words = ["no-bundle", "--prompt", "a", "--seeds", "1,2,3"]
    with pytest.raises(OutputError, match=r"3\.mp4 exists"):
        generate(parse_options(GenerateOptions, [*words, "--output", f"{tmp_path}/{{seed}}.mp4"]))
    with pytest.raises(OutputError, match="is not a folder"):
        generate(parse_options(GenerateOptions, [*words, "--output", f"{tmp_path}/{{seed}}/x.mp4"]))
    assert [path.name for path in tmp_path.iterdir()] == ["3.mp4"]


@pytest.fixture
def embeddings(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """One prompt's embeddings, so that neither text encoder nor torch is needed."""
    path = tmp_path / "e.safetensors"
    video = tiny_bundle.manifest.video
    shape = (1, video.text_tokens, tiny_bundle.manifest.architecture.text_dim)
    save_embeddings(path, noise(shape, 1), ["a fox"])
    return path


def run_generate(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """The exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["anyflow-generate", *words])
    with pytest.raises(SystemExit) as ended:
        run("anyflow-generate", GenerateOptions, generate)
    return ended.value.code


def test_prompts_and_seeds_give_the_videos_of_single_runs_and_load_once(
    tiny_bundle: Bundle,
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loads: Counter[str] = Counter()

    def counted(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def wrapper(*args: object, **kwargs: object) -> object:
            loads[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    counted(video_pipeline, "load_engine")
    counted(pipeline_parts.PipelineParts, "release_text_encoder")
    counted(text_encoder.PromptEncoder, "__init__")
    (tmp_path / "p.txt").write_text("a red fox\nthe sea at night\n")
    pattern = tmp_path / "{index}.safetensors"
    saved = tmp_path / "words.safetensors"
    words = [str(tiny_bundle.path), "--prompts", str(tmp_path / "p.txt"), "--seeds", "3,4", *SMALL]
    words += ["--output", str(pattern), "--save-prompt-embeds", str(saved), "--json"]
    assert run_generate(monkeypatch, *words) == 0
    assert loads == {"load_engine": 1, "release_text_encoder": 1, "__init__": 1}

    prompts = ["a red fox", "the sea at night"]
    embeds = encode_prompts(tiny_pipeline, prompts, 512)
    np.testing.assert_array_equal(load_embeddings(saved)[0], embeds)
    assert load_embeddings(saved)[1] == prompts
    engine = load_engine(tiny_bundle)
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert set(document) == documented_fields("anyflow-generate")
    assert (document["requested"], document["failed"]) == (4, None)
    for number, video in enumerate(document["videos"]):
        assert set(video) == documented_fields("anyflow-generate", "field of a video")
        prompt, seed = number // 2, 3 + number % 2
        assert (video["index"], video["prompt"], video["seed"]) == (
            number + 1,
            prompts[prompt],
            seed,
        )
        assert (video["frames"], video["height"], video["steps"]) == (1, 16, [2])
        assert video["deadline_met"] is None and video["first_frame_seconds"] is None
        start = noise((1, 1, 16, 2, 2), seed)
        wanted = sample(engine, start, embeds[prompt : prompt + 1], Schedule.uniform(2))
        np.testing.assert_array_equal(load_file(video["output"])["latents"], wanted)
        assert f"{number + 1} of 4: {video['output']}" in said.err.replace("\n", "")


def break_second(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the second video of a run fail in its sampling."""
    calls: list[int] = []

    def failing(*args: object, **kwargs: object) -> Array:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return sample(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(video_pipeline, "sample", failing)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (AnyFlowError("the device is gone."), 1, "error: video 2 of 3: {2}, seed 2: the device is"),
        (KeyboardInterrupt(), 130, "interrupted; 1 of 3 videos is written, {1}."),
    ],
)
def test_a_failure_names_its_video_and_what_is_written(
    error: BaseException,
    status: int,
    message: str,
    tiny_bundle: Bundle,
    embeddings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_second(monkeypatch, error)
    words = [str(tiny_bundle.path), "--prompt-embeds", str(embeddings), "--seeds", "1,2,3", *SMALL]
    words += ["--output", str(tmp_path / "z{seed}.safetensors"), "--json"]
    assert run_generate(monkeypatch, *words) == status
    said = capsys.readouterr()
    names = [None, *(tmp_path / f"z{seed}.safetensors" for seed in (1, 2, 3))]
    text = said.err.replace("\n", "")
    assert message.format(*names) in text
    assert f"1 of 3 videos is written, {names[1]}." in text
    document = json.loads(said.out)
    assert [video["output"] for video in document["videos"]] == [str(names[1])]
    assert document["failed"] == {
        "index": 2,
        "prompt": None,
        "seed": 2,
        "output": str(names[2]),
        "error": str(error) or "KeyboardInterrupt",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.safetensors", "z1.safetensors"]


def test_a_defect_keeps_its_traceback_and_is_named(
    tiny_bundle: Bundle,
    embeddings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_second(monkeypatch, ZeroDivisionError("none"))
    words = [str(tiny_bundle.path), "--prompt-embeds", str(embeddings), "--seeds", "1,2", *SMALL]
    words += ["--output", str(tmp_path / "{seed}.safetensors")]
    with pytest.raises(ZeroDivisionError):
        generate(parse_options(GenerateOptions, words))
    said = capsys.readouterr().err.replace("\n", "")
    assert "video 2 of 2:" in said and "1 of 2 videos is written" in said


def test_a_prompt_that_is_too_long_is_named_before_any_is_encoded(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        text_encoder.PromptEncoder, "load", lambda self: pytest.fail("it was loaded")
    )
    (tmp_path / "p.txt").write_text("a fox\n" + "snow " * 600 + "\n")
    words = [str(tiny_bundle.path), "--prompts", str(tmp_path / "p.txt"), *SMALL]
    words += ["--output", str(tmp_path / "{index}.safetensors")]
    with pytest.raises(
        AnyFlowError, match=r'"snow snow .*…" in .*p.txt: the prompt has 601 tokens'
    ):
        generate(parse_options(GenerateOptions, words))
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]
