"""Shards: an exact order and position, broken samples, and what is refused before work starts."""

from __future__ import annotations

import io
import json
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from webdataset import TarWriter

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.training.data.samples import SampleShape
from anyflow_deploy.training.data.shard_source import NEGATIVE, ShardSource
from anyflow_deploy.training.data.source import DataShard
from anyflow_deploy.training.data.tar_index import index_shards
from anyflow_deploy.training.timestep_sampling import seeded_normal
from anyflow_deploy.training.trainer import train
from tests.conftest import SMALL
from tests.integration.test_training import ROOT, command, environment, losses, request

SHAPE = SampleShape((3, 4, 8, 8), (4, 32))


def sample(number: int) -> dict[str, Any]:
    tensors = {
        "latents": seeded_normal(SHAPE.latents, 0, "l", number),
        "text": seeded_normal((1 + number % 4, 32), 0, "t", number),
    }
    return {
        "__key__": f"clip-{number:02d}",
        "safetensors": safetensors.torch.save(tensors),
        "txt": b"a red fox",
    }


def latents_of(number: int) -> Tensor:
    return seeded_normal(SHAPE.latents, 0, "l", number)


def shards(
    folder: Path,
    count: int = 10,
    change: Callable[[dict[str, Any]], Any] = lambda s: None,
    each: int = 4,
) -> Path:
    """`count` samples in shards made by webdataset itself."""
    folder.mkdir()
    for number in range(0, count, each):
        with TarWriter(str(folder / f"s-{number:03d}.tar"), encoder=False, mtime=0.0) as writer:
            for one in map(sample, range(number, min(number + each, count))):
                change(one)
                writer.write(one)
    safetensors.torch.save_file({"text": torch.zeros(1, 32)}, folder / NEGATIVE)
    return folder


PAIRS = DataShard(0, 1, 2)


def source(folder: Path, part: DataShard = PAIRS, seed: int = 0) -> ShardSource:
    return ShardSource(index_shards(folder), part, SHAPE, seed, None)


def names(
    folder: Path, world: int, batch: int, steps: int, position: int = 0, seed: int = 0
) -> list[str]:
    sources = [source(folder, DataShard(rank, world, batch), seed) for rank in range(world)]
    for one in sources:
        one.load_state_dict({**one.state_dict(), "samples": position})
    streams = [iter(one) for one in sources]
    found = [name for _ in range(steps) for stream in streams for name in next(stream).names]
    assert {one.state_dict()["samples"] for one in sources} == {position + world * batch * steps}
    return found


def test_the_order_is_the_seeds_alone_and_each_epoch_has_all(tmp_path: Path) -> None:
    folder = shards(tmp_path / "data")
    one = names(folder, 1, 4, 5)
    assert one == names(folder, 2, 2, 5) == names(folder, 4, 1, 5)
    assert (
        sorted(one[:10]) == sorted(one[10:]) == [e.name for e in index_shards(folder).entries]
        and one[:10] != one[10:]
    )
    for position in (4, 8, 12):
        assert names(folder, 2, 1, 4, position) == one[position : position + 8]
    assert names(folder, 1, 4, 5, seed=1) != one


def test_a_batch_is_what_was_stored(tmp_path: Path) -> None:
    batch = next(iter(source(shards(tmp_path / "data"), DataShard(0, 1, 5))))
    for row, name in enumerate(batch.names):
        number = int(name[-2:])
        assert torch.equal(batch.latents[row], latents_of(number))
        stored = seeded_normal((1 + number % 4, 32), 0, "t", number)
        assert (
            torch.equal(batch.text[row, : len(stored)], stored)
            and not batch.text[row, len(stored) :].any()
        )
    assert batch.captions == ("a red fox",) * 5 and batch.negative_text.shape == (1, 4, 32)


def break_sample(one: dict[str, Any], number: int = 3) -> None:
    if one["__key__"] == f"clip-{number:02d}":
        one["safetensors"] = one["safetensors"][:-7]


def test_a_broken_sample_is_replaced_and_named_and_others_keep_their_places(tmp_path: Path) -> None:
    whole = names(shards(tmp_path / "whole"), 1, 4, 10)
    folder = shards(tmp_path / "broken", change=break_sample)
    found = names(folder, 1, 4, 10)
    assert [a == b for a, b in zip(found, whole, strict=True)] == [
        "clip-03" not in name for name in whole
    ]
    assert "s-000.tar/clip-03" not in found
    assert found == names(folder, 2, 2, 10) and names(folder, 2, 1, 6, 8) == found[8:20]
    one = source(folder, DataShard(0, 1, 10))
    stream = iter(one)
    next(stream), next(stream)
    (told,) = one.pop_broken_samples()
    assert told.startswith("s-000.tar/clip-03: ") and one.pop_broken_samples() == []


def test_too_many_broken_samples_stop(tmp_path: Path) -> None:
    def spoil(one: dict[str, Any]) -> None:
        for number in range(1, 8):
            break_sample(one, number)

    with pytest.raises(
        AnyFlowError,
        match=r"4 of \d+ samples read from .* are broken, too many .*clip-0\d: .*Repair or remove",
    ):
        names(shards(tmp_path / "data", change=spoil), 1, 4, 5)


def test_a_few_samples_that_are_all_broken_stop_too(tmp_path: Path) -> None:
    def spoil(one: dict[str, Any]) -> None:
        one["safetensors"] = one["safetensors"][:-7]

    with pytest.raises(AnyFlowError, match="samples in a row from .* are broken"):
        names(shards(tmp_path / "data", count=2, change=spoil), 1, 2, 1)


class Bomb:
    def __reduce__(self) -> Any:
        return Path("/nonexistent/a-pickle-was-loaded").write_text, ("x",)


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.lib.format.write_array(array, np.array([Bomb()], dtype=object))
    for number, payload in enumerate(
        [
            {"pyd": pickle.dumps(Bomb())},
            {"pth": pickle.dumps(Bomb())},
            {"latents.npy": array.getvalue(), "text.npy": b""},
        ]
    ):

        def spoil(one: dict[str, Any], payload: dict[str, bytes] = payload) -> None:
            if one.pop("safetensors"):
                one.update(payload)

        with pytest.raises(AnyFlowError, match=r"no video or no caption|allow_pickle=False"):
            source(shards(tmp_path / str(number), change=spoil)).check()


def test_numpy_arrays_serve_too(tmp_path: Path) -> None:
    def numpy(one: dict[str, Any]) -> None:
        for name, tensor in safetensors.torch.load(one.pop("safetensors")).items():
            file = io.BytesIO()
            np.save(file, tensor.numpy())
            one[f"{name}.npy"] = file.getvalue()

    plain, other = (
        next(iter(source(shards(tmp_path / n, change=c))))
        for n, c in (("a", lambda s: None), ("b", numpy))
    )
    assert torch.equal(plain.latents, other.latents) and torch.equal(plain.text, other.text)


def replaced(**members: bytes) -> Callable[[dict[str, Any]], None]:
    def change(one: dict[str, Any]) -> None:
        one.pop("safetensors"), one.pop("txt")
        one.update(members)

    return change


def stored(latents: Tensor, text: Tensor) -> Callable[[dict[str, Any]], None]:
    return replaced(safetensors=safetensors.torch.save({"latents": latents, "text": text}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            stored(torch.zeros(2, 4, 8, 8), torch.zeros(4, 32)),
            r"\(2, 4, 8, 8\), the recipe has \(3, 4, 8, 8\). Give the --frames",
        ),
        (
            stored(torch.zeros(3, 4, 8, 8), torch.zeros(4, 31)),
            r"text \(tokens, channels\) \(4, 31\), the recipe has at most",
        ),
        (stored(torch.full((3, 4, 8, 8), torch.nan), torch.zeros(4, 32)), "not finite"),
        (
            stored(torch.zeros(3, 4, 8, 8, dtype=torch.int32), torch.zeros(4, 32)),
            r"numbers of type torch.int32",
        ),
        (
            replaced(safetensors=safetensors.torch.save({"text": torch.zeros(4, 32)})),
            "no tensor latents",
        ),
        (
            replaced(mp4=b"x"),
            r"10 of 10 samples .* have no video or no caption, such as s-000.tar/clip-00 \(mp4\)",
        ),
    ],
)
def test_samples_that_the_first_minute_refuses(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(AnyFlowError, match=message):
        source(shards(tmp_path / "data", change=change)).check()


def test_the_last_sample_is_looked_at_too(tmp_path: Path) -> None:
    with pytest.raises(AnyFlowError, match=r"s-008.tar/clip-09: "):
        source(shards(tmp_path / "data", change=lambda one: break_sample(one, 9))).check()


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        AnyFlowError, match=r"which is not a folder. Give 'synthetic', or a folder of shards"
    ):
        index_shards(tmp_path / "nowhere")
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(
        AnyFlowError, match=r"holds no shards \(\*.tar\) but clip.mp4. .*anyflow-precompute"
    ):
        index_shards(tmp_path)
    folder = shards(tmp_path / "data")
    (folder / NEGATIVE).rename(tmp_path / NEGATIVE)
    with pytest.raises(AnyFlowError, match=r"need the empty prompt's embedding"):
        source(folder)
    (folder / "x.tar.gz").touch()
    with pytest.raises(AnyFlowError, match=r"holds x.tar.gz: compressed shards"):
        index_shards(folder)
    (folder / "x.tar.gz").unlink()
    last = folder / "s-008.tar"
    for length in (0, 700, 3000):
        last.write_bytes(last.read_bytes()[:length] if length else b"")
        with pytest.raises(AnyFlowError, match=r"s-008.tar is damaged \(.*Copy or make it again"):
            index_shards(folder)
        shards(tmp_path / f"again-{length}")
        last.write_bytes((tmp_path / f"again-{length}" / "s-008.tar").read_bytes())
    with tarfile.open(folder / "twice.tar", "w") as file:
        for _ in range(2):
            file.addfile(tarfile.TarInfo("clip.txt"))
    with pytest.raises(AnyFlowError, match=r"has clip.txt twice"):
        index_shards(folder)


def test_a_position_in_other_data_is_refused(tmp_path: Path) -> None:
    state = source(shards(tmp_path / "ten")).state_dict()
    source(shards(tmp_path / "copy")).load_state_dict(json.loads(json.dumps(state)))
    other = source(shards(tmp_path / "nine", 9))
    for wrong in (state, {"samples": 0}, {**other.state_dict(), "samples": -1}):
        with pytest.raises(AnyFlowError, match=r"of other data than .* now has"):
            other.load_state_dict(wrong)


@pytest.mark.usefixtures("one_thread")
def test_kill_9_while_reading_shards(tmp_path: Path) -> None:
    """Bit for bit, over epochs and past a broken sample, which is named in the run's folder."""
    folder = shards(tmp_path / "data", change=break_sample)
    killed = tmp_path / "killed"
    words = command(
        "flow-map-tiny",
        f"--init={SMALL}",
        f"--output={killed}",
        "--steps=100000",
        f"--data={folder}",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", *words], env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    log = killed / "losses.jsonl"
    deadline = time.monotonic() + 600
    while not (log.exists() and log.read_text().count("\n") >= 5) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = log.read_text().count("\n") + 2
    for output in (killed, tmp_path / "whole"):
        given = request(output, steps=steps)
        train(type(given)(**{**vars(given), "data": str(folder)}))
    assert losses(killed) == losses(tmp_path / "whole")
    (line,) = (tmp_path / "whole" / "skipped-0.txt").read_text().splitlines()
    assert line.startswith("step ") and "s-000.tar/clip-03" in line
