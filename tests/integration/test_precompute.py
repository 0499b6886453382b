"""anyflow-precompute: what it writes is what the checkpoint's encoders make, whole or not at all,
and trains."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from webdataset import WebDataset

from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.cli.precompute import PROGRAM, PrecomputeOptions, run_precompute
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.text_encoder import encode_prompts
from anyflow_deploy.pipelines.vae import encode_video
from anyflow_deploy.pipelines.video_io import load_video, save_video
from anyflow_deploy.training.data import precompute as module
from anyflow_deploy.training.data.clips import read_clip
from anyflow_deploy.training.data.moving_shapes import save_videos
from anyflow_deploy.training.data.shard_source import open_source
from anyflow_deploy.training.data.source import DataShard
from anyflow_deploy.training.recipes import get_recipe, override_recipe
from anyflow_deploy.training.run_spec import RunSpec
from anyflow_deploy.training.trainer import train
from tests.json_reference import documented_fields
from tests.media import turn_clip, write_clip

COUNT = 5
VALUES = {
    "frames": 2,
    "height": 4,
    "width": 6,
    "text_tokens": 64,
    "batch": 2,
    "micro_batch": 2,
    "steps": 1,
    "sample_every": 0,
}
CHOSEN = override_recipe(get_recipe("flow-map-tiny"), VALUES)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    save_videos(folder, COUNT, (5, 32, 48))
    (folder / "00004.txt").write_text("snow")  # captions of several lengths
    return folder


def options(clips: Path, pipeline: Path, output: Path, **changed: str) -> PrecomputeOptions:
    values = {
        "frames": "5",
        "height": "32",
        "width": "48",
        "text_tokens": "64",
        "shard_samples": "2",
        **changed,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return parse_options(
        PrecomputeOptions, [str(clips), f"--checkpoint={pipeline}", f"--output={output}", *flags]
    )


@pytest.fixture(scope="module")
def made(clips: Path, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "shards"
    assert run_precompute(options(clips, tiny_pipeline, output)) == 0
    return output


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_what_the_encoders_make(clips: Path, tiny_pipeline: Path, made: Path) -> None:
    shards = [f"shard-00000{n}.tar" for n in range(3)]
    assert sorted(files(made)) == sorted(["dataset.json", "negative.safetensors", *shards])
    # WebDataset yields undecoded bytes here.
    found = list(WebDataset([str(made / name) for name in shards], shardshuffle=False))
    assert [one["__key__"] for one in found] == [f"{n:05d}" for n in range(COUNT)]
    for one in found:
        caption = (clips / f"{one['__key__']}.txt").read_text().strip()
        assert one["txt"].decode() == caption
        tensors = safetensors.torch.load(one["safetensors"])
        frames = load_video(clips / f"{one['__key__']}.mp4")
        assert torch.equal(
            tensors["latents"], torch.from_numpy(encode_video(tiny_pipeline, frames))[0]
        )
        text = torch.from_numpy(encode_prompts(tiny_pipeline, [caption], 64))[0]
        length = len(tensors["text"])
        assert (
            torch.equal(tensors["text"], text[:length]) and not text[length:].any() and length < 64
        )


def test_what_is_missing_is_made_again_to_the_same_bytes(
    clips: Path, tiny_pipeline: Path, made: Path, tmp_path: Path
) -> None:
    output = tmp_path / "shards"
    shutil.copytree(made, output)
    (output / "shard-000001.tar").unlink()
    (output / "shard-000002.tar").write_bytes(b"kept: it has its name")
    (output / ".anyflow-0123.partial").write_bytes(b"of a run that was killed")
    with pytest.raises(
        AnyFlowError, match=r"has 2 of 3 shards: anyflow-precompute was stopped. Run it again"
    ):
        module.read_manifest(output).check(output, None)  # type: ignore[arg-type]
    assert run_precompute(options(clips, tiny_pipeline, output)) == 0
    assert files(output) == {**files(made), "shard-000002.tar": b"kept: it has its name"}


def test_several_workers_make_the_same_bytes(
    clips: Path, tiny_pipeline: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many threads each as `made` had: sums are split by threads."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2 * torch.get_num_threads())
    assert run_precompute(options(clips, tiny_pipeline, tmp_path / "shards", workers="2")) == 0
    assert files(tmp_path / "shards") == files(made)


def test_training_takes_the_shards_and_the_videos_themselves(
    clips: Path, tiny_pipeline: Path, made: Path, tmp_path: Path
) -> None:
    model = train(RunSpec(CHOSEN, tmp_path / "run", tiny_pipeline, data=str(made), device="cpu"))
    assert (model / "model_index.json").is_file()
    raw = tmp_path / "raw"
    raw.mkdir()
    with tarfile.open(raw / "clips.tar", "w") as file:
        for path in sorted(clips.iterdir()):
            file.add(path, path.name)
    weights = open_checkpoint(tiny_pipeline)
    stored, encoded = (
        open_source(str(f), CHOSEN, weights, DataShard(0, 1, 5)) for f in (made, raw)
    )
    assert (
        "5 samples (latents) in 3 shards" in stored.check()
        and "(videos) in 1 shards" in encoded.check()
    )
    one, other = next(iter(stored)), next(iter(encoded))
    assert [n.partition("/")[2] for n in one.names] == [n.partition("/")[2] for n in other.names]
    assert torch.allclose(one.latents, other.latents, atol=1e-5) and torch.allclose(
        one.text, other.text, atol=1e-5
    )
    assert torch.equal(one.negative_text, other.negative_text) and one.negative_text.any()
    with pytest.raises(
        AnyFlowError,
        match=r"lacks vae, text_encoder, tokenizer to encode them. Start from a whole pipeline",
    ):
        open_source(
            str(raw),
            CHOSEN,
            open_checkpoint(Path(__file__).parents[1] / "golden" / "bidirectional"),
            DataShard(0, 1, 1),
        )


def test_bfloat16_is_half_and_within_its_digits(
    clips: Path, tiny_pipeline: Path, made: Path, tmp_path: Path
) -> None:
    assert run_precompute(options(clips, tiny_pipeline, tmp_path / "half", type="bfloat16")) == 0
    weights = open_checkpoint(tiny_pipeline)
    one, half = (
        next(iter(open_source(str(f), CHOSEN, weights, DataShard(0, 1, 5))))
        for f in (made, tmp_path / "half")
    )
    assert 0 < (one.latents - half.latents).abs().max() / one.latents.abs().max() < 2**-8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"frames": 3},
            (
                r"made with latents \(F, C, H, W\) \(2, 16, 4, 6\); .* Give --frames 2 --height 4"
                r" --width 6"
            ),
        ),
        (
            {"text_tokens": 8},
            r"made with text \(64, 64\) .* at most \(8, 64\). Give --text-tokens 64",
        ),
    ],
)
def test_a_recipe_of_another_shape_is_refused(
    tiny_pipeline: Path, made: Path, tmp_path: Path, changed: dict[str, int], message: str
) -> None:
    chosen = override_recipe(CHOSEN, changed)
    with pytest.raises(AnyFlowError, match=message):
        train(RunSpec(chosen, tmp_path / "run", tiny_pipeline, data=str(made), device="cpu"))


def test_broken_videos_are_skipped_until_they_are_too_many(
    clips: Path, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, output = tmp_path / "clips", tmp_path / "shards"
    shutil.copytree(clips, given)
    (given / "00001.mp4").write_bytes(b"not a video")
    save_video(given / "00002.mp4", np.zeros((3, 32, 48, 3), np.uint8), 16)
    (given / "00003.txt").write_text("rain " * 80)
    assert run_precompute(options(given, tiny_pipeline, output, json="True")) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == documented_fields("anyflow-precompute")
    assert (document["videos"], document["skipped"]) == (len(list(given.glob("*.mp4"))), 3)
    assert document["skipped_list"] == str(output / "skipped.jsonl")
    skipped = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert [line[:9] for line in skipped] == ["00001.mp4", "00002.mp4", "00003.mp4"]
    assert (
        "has 0.19 s; 5 frames at 16 a second take 0.31 s" in skipped[1]
        and "tokens and the model takes 64" in skipped[2]
    )
    assert (
        "2 samples"
        in open_source(
            str(output), CHOSEN, open_checkpoint(tiny_pipeline), DataShard(0, 1, 1)
        ).check()
    )
    (given / "00000.mp4").write_bytes(b"not a video either")
    with pytest.raises(AnyFlowError, match=r"4 of 4 videos cannot be used, too many"):
        run_precompute(options(given, tiny_pipeline, tmp_path / "other"))


def test_what_is_refused_before_work(
    clips: Path, tiny_pipeline: Path, made: Path, tmp_path: Path
) -> None:
    for changed, message in (
        ({"type": "bfloat16"}, r"holds shards of other type. Choose another --output"),
        ({"frames": "9", "shard_samples": "3"}, r"of other latents, shards, shard_samples"),
        ({"frames": "6"}, r"frames is 6; allowed are 4n\+1"),
    ):
        with pytest.raises(AnyFlowError, match=message):
            run_precompute(options(clips, tiny_pipeline, made, **changed))
    with pytest.raises(AnyFlowError, match=r"exists and holds something else"):
        run_precompute(options(clips, tiny_pipeline, clips))
    with pytest.raises(
        AnyFlowError, match=r"lacks vae, text_encoder, tokenizer. Give the whole pipeline"
    ):
        run_precompute(options(clips, tmp_path, tmp_path / "x"))
    with pytest.raises(AnyFlowError, match=r"is not a folder"):
        run_precompute(options(tmp_path / "nowhere", tiny_pipeline, tmp_path / "x"))
    with pytest.raises(AnyFlowError, match=r"holds no videos"):
        run_precompute(options(tmp_path, tiny_pipeline, tmp_path / "x"))
    given = tmp_path / "clips"
    shutil.copytree(clips, given)
    (given / "00003.txt").unlink()
    with pytest.raises(
        AnyFlowError,
        match=r"1 of 5 videos have no caption, such as .*00003.mp4. Write .* into 00003.txt",
    ):
        run_precompute(options(given, tiny_pipeline, tmp_path / "x"))
    shutil.copy(given / "00001.mp4", given / "00001.MOV")
    with pytest.raises(
        AnyFlowError, match=r"holds 2 videos whose name in a shard would be '00001'"
    ):
        run_precompute(options(given, tiny_pipeline, tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_a_clip_plays_as_fast_as_it_was_and_is_cut_in_the_middle(tmp_path: Path) -> None:
    frames = (
        np.zeros((12, 32, 96, 3), np.uint8)
        + (20 * np.arange(12, dtype=np.uint8))[:, None, None, None]
    )
    frames[:, :, :24] = frames[:, :, -24:] = 255
    save_video(tmp_path / "fast.mp4", frames, 32)
    # Every second frame and 48 of 96 columns stay.
    found = read_clip(tmp_path / "fast.mp4", "fast", 5, 16, 24)
    assert found.shape == (5, 16, 24, 3)
    # 21 levels are one frame of rounding.
    assert np.abs(found.astype(int).mean((1, 2, 3)) - [0, 40, 80, 120, 160]).max() <= 21
    assert found.max() < 190, "the bright sides are cut off"
    save_video(tmp_path / "slow.mp4", frames[:4], 8)
    slow = read_clip((tmp_path / "slow.mp4").read_bytes(), "slow", 8, 32, 96)[:, :, 30:60].mean(
        (1, 2, 3)
    )
    assert np.abs(slow[::2] - slow[1::2]).max() < 5 and len(set((slow / 10).astype(int))) >= 3
    with pytest.raises(AnyFlowError, match=r"tiny is 32 x 96, too small for 480 x 832"):
        read_clip(tmp_path / "slow.mp4", "tiny", 1, 480, 832)


def test_videos_of_phones_are_encoded_as_they_are_shown(
    clips: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """Turned by 90 degrees, at uneven times, in other containers, behind a link."""
    given, output = tmp_path / "given", tmp_path / "shards"
    (given / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (given / "linked").symlink_to(tmp_path / "elsewhere")
    times = [0, 0.03, 0.06, 0.2, 0.22, 0.24]  # at 16 a second: 0, 2, 2, 2, 5
    stored = [np.rot90(bars(n), 1) for n in range(6)]
    turn_clip(write_clip(given / "a" / "Phone.MOV", stored, times), (0, 1, -1, 0))
    frames = [bars(n) for n in (0, 2, 2, 2, 5)]
    write_clip(tmp_path / "elsewhere" / "plain.webm", frames, codec="libvpx-vp9")
    for path in (given / "a" / "Phone.MOV", tmp_path / "elsewhere" / "plain.webm"):
        path.with_suffix(".txt").write_text("a bar moves")
    assert run_precompute(options(given, tiny_pipeline, output)) == 0
    phone, plain = WebDataset([str(output / "shard-000000.tar")], shardshuffle=False)
    assert (phone["__key__"], plain["__key__"]) == ("a_Phone", "linked_plain")
    latents = [safetensors.torch.load(one["safetensors"])["latents"] for one in (phone, plain)]
    wanted = torch.from_numpy(encode_video(tiny_pipeline, np.stack(frames)))[0]
    wrong = torch.from_numpy(encode_video(tiny_pipeline, np.stack([bars(n) for n in range(5)])))[0]
    for found in latents:  # nearer than a lossy codec's error to what is shown, far from the rest
        assert (found - wanted).norm() < 0.3 * (wrong - wanted).norm()


def bars(number: int) -> NDArray[np.uint8]:
    """A bright bar whose place says the number."""
    frame = np.full((32, 48, 3), 40, np.uint8)
    frame[4:20, 8 * number : 8 * number + 8] = 230
    return frame


def test_other_files_are_counted_and_named(
    clips: Path,
    tiny_pipeline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = tmp_path / "clips"
    shutil.copytree(clips, given)
    for name in ("a.jpg", "b.JPG", "x.part", "readme.txt", ".hidden"):
        (given / name).write_bytes(b"-")
    monkeypatch.setattr(module, "Encoders", lambda *_: pytest.fail("that was all"))
    with pytest.raises(pytest.fail.Exception):
        run_precompute(options(given, tiny_pipeline, tmp_path / "x"))
    said = " ".join(capsys.readouterr().err.split())
    assert "not read: 2 .jpg (such as a.jpg), 1 .txt (such as readme.txt), 1 .part" in said or (
        "not read: 2 .jpg (such as a.jpg), 1 .part (such as x.part), 1 .txt (such as readme.txt)"
        in said
    )


def test_a_folder_of_broken_videos_alone_is_no_success(tiny_pipeline: Path, tmp_path: Path) -> None:
    given, output = tmp_path / "clips", tmp_path / "shards"
    given.mkdir()
    for name in ("a", "b"):
        (given / f"{name}.mp4").write_bytes(b"not a video")
        (given / f"{name}.txt").write_text("a fox")
    for _ in range(2):  # the second time, too
        with pytest.raises(AnyFlowError, match=r"none of the 2 videos can be used: b.mp4: "):
            run_precompute(options(given, tiny_pipeline, output))
    assert not list(output.glob("*.tar"))


def test_a_full_disk_has_its_reason_and_the_work_resumes(
    clips: Path,
    tiny_pipeline: Path,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, count = module.write_bytes_atomically, [0]

    def fill(path: Path, data: bytes) -> None:
        count[0] += 1
        if count[0] > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(module, "write_bytes_atomically", fill)
    output = tmp_path / "shards"
    with pytest.raises(
        AnyFlowError, match=r"shards cannot be written: No space left on device. Make room"
    ):
        run_precompute(options(clips, tiny_pipeline, output))
    monkeypatch.undo()
    assert run_precompute(options(clips, tiny_pipeline, output)) == 0
    assert files(output) == files(made)


def test_how_videos_were_fitted_belongs_to_the_shards(
    clips: Path, tiny_pipeline: Path, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(AnyFlowError, match=r"holds shards of other fit, background"):
        run_precompute(options(clips, tiny_pipeline, made, fit="pad", background="white"))
    with pytest.raises(AnyFlowError, match=r"background is 'clear'; allowed are"):
        run_precompute(options(clips, tiny_pipeline, made, background="clear"))
    wide = write_clip(tmp_path / "a.mkv", [np.full((32, 96, 3), 120, np.uint8)] * 5, codec="ffv1")
    padded = read_clip(wide, "a", 5, 32, 48, mode="pad", background=(0, 200, 0))
    assert (padded[:, :8] == (0, 200, 0)).all() and (padded[:, 8:24, :, 0] > 100).all()


def test_the_examples_parse() -> None:
    for example in PrecomputeOptions.EXAMPLES:
        words = shlex.split(example)
        assert words[0] == PROGRAM and parse_options(PrecomputeOptions, words[1:]).output == Path(
            "shards"
        )
