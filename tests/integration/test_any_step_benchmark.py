from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def any_step(*words: str) -> dict[str, object]:
    command = [
        sys.executable,
        str(BENCHMARKS / "any_step.py"),
        "--tiny",
        "--processes",
        "1",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_any_step_benchmark_runs_in_small_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """All four methods at one cost; a second call makes nothing again and measures the same."""
    result = any_step("--work", str(tmp_path / "work"), "--picture", str(tmp_path / "any_step.png"))
    costs, passes = result["costs"]["runs"], result["costs"]["passes_a_step"]  # type: ignore[index]
    spent = {
        "full": 2 * passes["flow-map"] + costs["on-policy-0"]["steps"] * passes["on-policy"],
        "flow-map": costs["flow-map-0"]["steps"] * passes["flow-map"],
        "consistency": costs["consistency-0"]["steps"] * passes["consistency"],
    }
    assert all(
        cost == pytest.approx(spent["full"], abs=passes["consistency"]) for cost in spent.values()
    )
    table = result["distances"]["frechet"]  # type: ignore[index]
    assert set(table) == {"teacher", "full", "flow-map", "consistency"}
    assert all(
        len(row) == 6 and all(mean > 0 and spread >= 0 for mean, spread in row)
        for row in table.values()
    )
    assert (tmp_path / "any_step.png").stat().st_size > 10_000
    again = any_step("--work", str(tmp_path / "work"))
    assert again["distances"] == result["distances"] and again["costs"] == result["costs"]


def test_both_distances_see_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from any_step_distance import VideoSet, distances

    from anyflow_deploy.training.data.source import DataShard
    from anyflow_deploy.training.data.synthetic import SyntheticLatents

    def shapes(seed: int) -> VideoSet:
        batch = SyntheticLatents(DataShard(0, 1, 1), (2, 3, 8, 8), (6, 32), seed).batch(
            list(range(256))
        )
        return VideoSet(batch.latents, batch.text)

    data, other = shapes(0), shapes(1)
    floor = distances(other, data)
    assert all(value < 1e-6 for value in distances(data, data).values())
    blurred = VideoSet((other.latents + other.latents.roll(1, -1)) / 2, other.text)
    frozen = VideoSet(other.latents[:, :1].expand_as(other.latents), other.text)
    swapped = VideoSet(other.latents, other.text.roll(1, 0))
    for worse in (blurred, frozen, swapped):
        assert distances(worse, data)["frechet"] > 1.3 * floor["frechet"]
    assert (
        distances(VideoSet(other.latents * 1.3, other.text), data)["sliced_wasserstein"]
        > 1.3 * floor["sliced_wasserstein"]
    )
    assert torch.isfinite(data.latents).all()
