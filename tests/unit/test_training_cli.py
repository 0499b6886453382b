"""Recipes and the command: what is refused before work starts, and how it is said."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_deploy.cli.options import build_help, parse_options
from anyflow_deploy.cli.train import PROGRAM, make_options_type, work
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.training import preflight
from anyflow_deploy.training.data.source import Batch
from anyflow_deploy.training.distributed import DistributedContext, init_distributed
from anyflow_deploy.training.recipes import (
    get_recipe,
    override_recipe,
    recipe_fields,
    recipe_from_dict,
    recipe_names,
    recipe_to_dict,
)
from anyflow_deploy.training.run_spec import RunSpec
from anyflow_deploy.training.trainer import train
from tests.conftest import CAUSAL, SMALL


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_and_survives_json(name: str) -> None:
    chosen = get_recipe(name)
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(chosen)))) == chosen
    assert chosen.causal == name.endswith("-causal")
    assert chosen.architecture.full_chunk_limit == (3 if chosen.causal else None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.frames = 1  # type: ignore[misc]


def test_the_constants_are_the_papers() -> None:
    one = get_recipe("flow-map-1.3b")
    two = get_recipe("on-policy-14b-causal")
    assert (one.optimizing.steps, one.optimizing.batch, one.optimizing.learning_rate) == (
        6000,
        32,
        5e-5,
    )
    assert (
        one.optimizing.ema,
        one.optimizing.ema_start,
        one.adapting.lora_rank,
        one.flow.guidance,
    ) == (0.999, 1000, 256, 3)
    assert (two.optimizing.learning_rate, two.optimizing.beta1, two.optimizing.beta2) == (
        2e-6,
        0.0,
        0.999,
    )
    assert (two.optimizing.ema, two.flow.rollout_steps, two.flow.real_guidance) == (
        0.99,
        (2, 4, 8, 16, 50),
        3,
    )
    assert (
        get_recipe("teacher-1.3b").flow.text_drop == 0.1
        and not get_recipe("teacher-1.3b").adapting.lora_times
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": "1"}, r"unknown setting 'stepz'. Did you mean 'steps'\?"),
        ({"steps": "many"}, r"--steps is 'many'"),
        ({"steps": "0"}, r"--steps is '0': input should be greater than 0"),
        ({"derivative": "exact"}, r"--derivative is 'exact': input should be 'central' or 'jvp'"),
        ({"sample_steps": "1,x"}, r"--sample-steps is 'x'"),
        ({"ema": "1.5"}, r"--ema is '1.5'"),
        ({"micro_batch": "3"}, r"--batch 8 is not a multiple of --micro-batch 3"),
        ({"height": "7"}, r"latents of 7 x 12 do not divide into patches of 2"),
        ({"frames": "300"}, r"--frames is 300; the model's rotary table ends at 256"),
    ],
)
def test_settings_that_are_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        override_recipe(get_recipe("flow-map-tiny"), values)


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        AnyFlowError, match=r"unknown recipe 'flowmap-1.3b'.*Did you mean 'flow-map-1.3b'\?"
    ):
        get_recipe("flowmap-1.3b")


def test_show_prints_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["on-policy-1.3b-causal", "--show", "--learning-rate", "1e-6", "--rollout-steps", "2,4"]
    assert work(parse_options(make_options_type(), words)) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["optimizing"]["learning_rate"] == 1e-6 and shown["flow"]["rollout_steps"] == [2, 4]
    assert shown["model"] == "far-1.3b"


def test_every_setting_is_a_flag_and_the_examples_parse() -> None:
    options = make_options_type()
    assert {name for name, _, _ in recipe_fields()} < set(options.model_fields)
    assert build_help(PROGRAM, options)
    for example in options.EXAMPLES:
        words = shlex.split(example)
        assert " ".join(words[:3]) == PROGRAM
        parse_options(options, words[3:])


def test_the_commands_of_the_documentation_parse() -> None:
    text = (
        (Path(__file__).parents[2] / "docs" / "how-to" / "training.md")
        .read_text()
        .replace("\\\n", " ")
    )
    lines = [
        line.split("anyflow_deploy.train ", 1)[1]
        for line in text.splitlines()
        if "-m anyflow_deploy.train " in line
    ]
    assert len(lines) >= 7
    for line in lines:
        chosen = parse_options(make_options_type(), shlex.split(line))
        assert chosen.recipe in recipe_names()


def refused(tmp_path: Path, name: str = "flow-map-tiny", **given: Any) -> None:
    values = given.pop("values", {})
    train(
        RunSpec(override_recipe(get_recipe(name), values), tmp_path / "run", device="cpu", **given)
    )


def test_checkpoints_that_are_missing_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(
        AnyFlowError, match=r"--init is missing: the folder of a Wan2.1 or AnyFlow checkpoint"
    ):
        refused(tmp_path, "flow-map-1.3b")
    with pytest.raises(AnyFlowError, match=r"--teacher is missing"):
        refused(tmp_path, "on-policy-tiny")
    with pytest.raises(AnyFlowError, match=r"--teacher belongs to the stage on-policy"):
        refused(tmp_path, teacher=SMALL)
    with pytest.raises(AnyFlowError, match=r"Add -causal to the recipe"):
        refused(tmp_path, init=CAUSAL)
    with pytest.raises(AnyFlowError, match=r"not a folder"):
        refused(tmp_path, init=tmp_path / "nowhere")
    with pytest.raises(AnyFlowError, match=r"--data is 'clips'|clips"):
        refused(tmp_path, data="clips")
    with pytest.raises(AnyFlowError, match=r"--shard is 4 and there is one process"):
        refused(tmp_path, shard=4)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_half_an_environment_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        AnyFlowError, match=r"has WORLD_SIZE and lacks LOCAL_RANK, MASTER_ADDR, MASTER_PORT, RANK"
    ):
        init_distributed(device="cpu")


def test_a_full_disk_and_a_small_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = get_recipe("flow-map-14b")
    alone = DistributedContext(0, 1, torch.device("cpu"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    with pytest.raises(
        AnyFlowError,
        match=r"4 checkpoints and the model take .* GiB; .* 0.9 GiB free. Lower --keep",
    ):
        preflight.check_disk(large, large.architecture, tmp_path)
    monkeypatch.setattr(
        preflight.os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 2**18
    )
    with pytest.raises(
        AnyFlowError,
        match=r"weights, gradients and optimizer take 4.\.\d GiB a process; there are 1.0 GiB",
    ):
        preflight.check_memory(large, large.architecture, alone)
    tiny = get_recipe("flow-map-tiny")
    assert "estimated" in preflight.check_memory(tiny, tiny.architecture, alone)


def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        AnyFlowError,
        match=r"training needs tensorboard\. Run: pip install 'anyflow-deploy\[train\]'",
    ):
        refused(tmp_path)
    with pytest.raises(AnyFlowError, match=r"training needs tensorboard and peft"):
        refused(tmp_path, values={"lora_rank": 4})
    monkeypatch.setattr(
        preflight.importlib.util, "find_spec", lambda name: None if name == "wandb" else name
    )
    with pytest.raises(AnyFlowError, match=r"--wandb needs the package wandb"):
        refused(tmp_path, wandb="project")


def test_data_of_another_shape_is_named() -> None:
    chosen = get_recipe("flow-map-tiny")
    a = chosen.architecture
    good = torch.zeros(1, chosen.frames, a.in_channels, chosen.height, chosen.width)
    with pytest.raises(AnyFlowError, match=r"samples clip-7 have latents"):
        preflight.check_batch(
            Batch(
                good[:, :2],
                torch.zeros(1, 4, a.text_dim),
                torch.zeros(1, 4, a.text_dim),
                ("clip-7",),
            ),
            chosen,
            a,
        )
    with pytest.raises(AnyFlowError, match=r"samples clip-7 have text"):
        preflight.check_batch(
            Batch(good, torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), ("clip-7",)), chosen, a
        )
