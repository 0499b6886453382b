"""Streams that cannot encode, signals, and the flags of other programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anyflow_deploy.cli.build import BuildOptions
from anyflow_deploy.cli.generate import generate
from anyflow_deploy.cli.generate_options import GenerateOptions
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.errors import AnyFlowError, OutputError

PRINT = """
from rich.console import Console
from anyflow_deploy.cli.options import Options, run
class Empty(Options):
    '''Nothing.'''
def work(options):
    Console().print("é… ×")
    return 0
run("anyflow-empty", Empty, work)
"""


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", b"?? ?"), ("latin-1", b"\xe9? \xd7"), ("utf-8", None)]
)
def test_what_cannot_be_encoded_is_replaced(encoding: str, printed: bytes | None) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PRINT], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.strip() == (printed or "é… ×".encode())


WORK = """
import os, sys, time
from pathlib import Path
from anyflow_deploy.bundle.outputs import OutputFolder
from anyflow_deploy.cli.options import Options, run
class Empty(Options):
    '''Nothing.'''
def work(options):
    with OutputFolder(Path({path!r})):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(9)
        child_is_there = True
        print("ready", flush=True)
        time.sleep(60)
    return 0
sys.argv[1:] = []
run("anyflow-empty", Empty, work)
"""


def test_sigterm_is_ctrl_c_and_leaves_nothing(tmp_path: Path) -> None:
    code = WORK.format(path=str(tmp_path / "bundle"))
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == 1
        os.killpg(process.pid, signal.SIGTERM)  # the forked worker ends, too, and says nothing
        errors = process.stderr.read()
    assert process.returncode == 130 and errors.startswith("interrupted"), errors
    assert list(tmp_path.iterdir()) == [] and "Traceback" not in errors


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--negative-prompt", "guidance is distilled into the model"),
        ("--guidance_scale", "guidance is distilled into the model"),
        ("--size", "the size is given as --height and --width, in pixels"),
        ("--fps", "the frame rate is the model's"),
        ("--num-inference-steps", "the number of steps is --steps"),
    ],
)
def test_flags_of_other_programs_are_refused_by_their_own_reason(flag: str, sentence: str) -> None:
    with pytest.raises(AnyFlowError, match=f"^unknown flag {flag.replace('_', '-')}: {sentence}"):
        parse_options(GenerateOptions, ["bundle", flag, "1"])
    with pytest.raises(AnyFlowError, match=rf"^unknown flag {flag.replace('_', '-')}\."):
        parse_options(BuildOptions, ["bundle", flag, "1"])


@pytest.mark.parametrize("flag", ["--output", "--save-prompt-embeds"])
def test_destinations_are_tried_before_the_bundle_is_opened(flag: str, tmp_path: Path) -> None:
    name = tmp_path / ("a" * 250 + ".safetensors")
    words = [str(tmp_path / "no-bundle"), "--prompt", "a fox", flag, str(name)]
    if flag != "--output":
        words += ["--output", str(tmp_path / "fox.mp4")]
    with pytest.raises(OutputError, match="its name has 262 bytes"):
        generate(parse_options(GenerateOptions, words))
    assert list(tmp_path.iterdir()) == []


def test_two_outputs_have_two_names(tmp_path: Path) -> None:
    words = ["bundle", "--prompt", "a", "--output", "x.safetensors"]
    words += ["--save-prompt-embeds", "x.safetensors"]
    with pytest.raises(AnyFlowError, match="--output and --save-prompt-embeds are both x"):
        generate(parse_options(GenerateOptions, words))


def test_a_seed_is_drawn_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path / "no-bundle"), "--prompt", "a fox", "--seed", "-1"]
    words += ["--output", str(tmp_path / "fox.mp4")]
    seeds = []
    for _ in range(2):
        with pytest.raises(AnyFlowError, match="is not a bundle"):
            generate(parse_options(GenerateOptions, words))
        seeds.append(int(capsys.readouterr().err.split()[1]))
    assert seeds[0] != seeds[1] and min(seeds) >= 0
    with pytest.raises(AnyFlowError, match="--seed is '-2'"):
        parse_options(GenerateOptions, [*words, "--seed=-2"])
