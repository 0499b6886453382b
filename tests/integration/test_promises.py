"""What the documents promise: commands in the README run, every script answers --help, the wheel
holds what it should."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from safetensors.numpy import save_file

from anyflow_deploy import MODELS, Bundle, noise
from anyflow_deploy.bundle.manifest import Manifest
from anyflow_deploy.checkpoints import hub
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.cli.options import parse_options
from tools.docs_site import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TUTORIAL = (ROOT / "docs" / "tutorials" / "first-video.md").read_text()
LAYOUT = (ROOT / "ARCHITECTURE.md").read_text().partition("## Repository layout")[2]
BIN = Path(sys.executable).parent


def blocks(language: str, document: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document, re.DOTALL)


def commands_in(document: str) -> list[list[str]]:
    lines = [
        line
        for block in blocks("sh", document)
        for line in block.splitlines()
        if line.startswith("anyflow-")
    ]
    return [shlex.split(line, comments=True) for line in lines]


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / words[0]), *words[1:]], cwd=cwd, capture_output=True, text=True, check=False
    )


def run_here(*words: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """A console script's exit status, from its entry point in this process: without seconds of
    imports each time."""
    (script,) = importlib.metadata.entry_points(group="console_scripts", name=words[0])
    monkeypatch.setattr(sys, "argv", list(words))
    with pytest.raises(SystemExit) as ended:
        script.load()()
    return ended.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_every_script_answers_help(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {command}")
    missing = [
        name
        for name, field in COMMANDS[command].model_fields.items()
        if (field.alias or name).replace("_", "-") not in done.stdout.lower()
    ]
    assert not missing


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_in_the_help_parse(command: str) -> None:
    for example in COMMANDS[command].EXAMPLES:
        words = shlex.split(example)
        assert words[0] == command
        parse_options(COMMANDS[command], words[1:])


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("anyflow-export", "--modle", "tiny"), 2, "unknown flag --modle. Did you mean '--model'?"),
        (("anyflow-export", "--model", "1.3"), 2, "unknown model '1.3'"),
        (("anyflow-export", "--model", "1.3b", "--precision", "bf16"), 2, "no bf16 matrix product"),
        (
            ("anyflow-fit", "--model", "14b", "--precision", "fp8", "--target", "orin"),
            2,
            "Choose --precision int8",
        ),
        (("anyflow-validate",), 2, "bundle is missing"),
        (("anyflow-inspect", "nowhere"), 1, "nowhere is not a bundle"),
        (("anyflow-generate", "nowhere", "--prompt", "x", "--steps", "0"), 2, "--steps is '0'"),
    ],
)
def test_wrong_usage_ends_before_work(
    tmp_path: Path, words: tuple[str, ...], status: int, message: str
) -> None:
    done = run(*words, cwd=tmp_path)
    assert done.returncode == status
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_command_is_in_the_readme_or_the_tutorial_and_parses() -> None:
    commands = commands_in(README) + commands_in(TUTORIAL)
    assert {words[0] for words in commands} == set(COMMANDS)
    for words in commands:
        parse_options(COMMANDS[words[0]], words[1:])


def test_the_commands_of_readme_and_tutorial_run(
    tiny_pipeline: Path,
    far_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those on `my-…`, in order and once, on tiny pipelines: the first as a user does, the others
    in this process."""
    (tmp_path / "my-anyflow").symlink_to(tiny_pipeline)
    (tmp_path / "my-far").symlink_to(far_pipeline)
    pyplot.imsave(tmp_path / "first.png", np.random.default_rng(0).random((64, 96, 3)))
    monkeypatch.chdir(tmp_path)
    ran: set[str] = set()
    readme = commands_in(README)
    for words in readme + [words for words in commands_in(TUTORIAL) if words not in readme]:
        if not any("my-" in word for word in words) or words[0] == "anyflow-serve":
            continue  # tests/integration/test_serve_command.py runs anyflow-serve
        if ran:
            status = run_here(*words, monkeypatch=monkeypatch)
            assert status == 0, (words, capsys.readouterr().err)
        else:
            done = run(*words, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        ran.add(words[0])
    assert set(COMMANDS) - ran == {
        "anyflow-doctor",
        "anyflow-fit",
        "anyflow-precompute",
        "anyflow-serve",
    }
    for name in ("fox", "fox-stream", "fox-image", "fox-deadline", "fox-quality", "fox-compiled"):
        assert (tmp_path / f"{name}.mp4").stat().st_size > 1000
    assert {path.name for path in (tmp_path / "my-bundle").glob("*.png")} == {
        "validation.png",
        "sensitivity.png",
    }


@pytest.mark.parametrize("block", blocks("python", README), ids=["pipeline", "diffusers"])
def test_the_readme_python_runs(
    block: str,
    tiny_pipeline: Path,
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "my-anyflow").symlink_to(tiny_pipeline)
    (tmp_path / "my-bundle").symlink_to(tiny_bundle.path)
    monkeypatch.chdir(tmp_path)
    size = {"height": 32, "width": 48, "num_frames": 5}
    names: dict[str, object] = {"size": size}
    exec(block.replace("num_inference_steps=4", "num_inference_steps=4, **size"), names)
    if "save(" in block:
        assert (tmp_path / "fox.mp4").stat().st_size > 1000
    else:
        assert names["video"].shape == (5, 32, 48, 3)  # type: ignore[attr-defined]


PYTHON_PAGE = (ROOT / "docs" / "how-to" / "python.md").read_text()


@pytest.mark.parametrize(
    "block", blocks("python", PYTHON_PAGE), ids=["pipeline", "stream", "without torch"]
)
def test_the_page_on_python_runs(
    block: str,
    tiny_bundle: Bundle,
    far_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "my-bundle").symlink_to(tiny_bundle.path)
    (tmp_path / "my-causal").symlink_to(far_bundle.path)
    save_file({"prompt_embeds": noise((1, 8, 64), 1)}, tmp_path / "fox.safetensors")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block.replace("(1, 21, 16, 60, 104)", "(1, 2, 16, 4, 6)"), names)
    if "latents" in names:
        assert np.isfinite(names["latents"]).all()  # type: ignore[call-overload]


def test_the_readme_is_short_and_shows_pictures_that_exist() -> None:
    assert len(README.splitlines()) <= 160
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 2 and all((ROOT / name).is_file() for name in pictures)


def test_the_layout_in_architecture_names_every_module() -> None:
    """Of each folder that has a line of its own for its modules: the commands and the services have
    one line for all."""
    package = ROOT / "anyflow_deploy"
    summed_up = ("cli", "doctor", "profiling", "serving")
    inner = [
        p
        for p in package.iterdir()
        if p.is_dir() and not p.is_symlink() and p.name not in summed_up
    ]
    files = [p for folder in (package, *inner) for p in folder.glob("*.py")]
    files += [p for name in ("export", "engines", "training") for p in (ROOT / name).rglob("*.py")]
    public = [path for path in files if not path.name.startswith("_")]
    assert not [str(path.relative_to(ROOT)) for path in public if path.name not in LAYOUT]
    roots = (
        "anyflow_deploy",
        "benchmarks",
        "engines",
        "examples",
        "export",
        "tests",
        "tools",
        "training",
    )
    known = {path.name for root in roots for path in (ROOT / root).rglob("*.py")}
    assert not [name for name in re.findall(r"(\w+\.py)", LAYOUT + README) if name not in known]


def test_the_format_document_names_every_manifest_key() -> None:
    text = (ROOT / "docs" / "reference" / "bundle.md").read_text()
    keys = [field.alias or name for name, field in Manifest.model_fields.items()]
    assert not [key for key in keys if f"`{key}`" not in text]


def test_the_hub_is_asked_for_what_is_needed_and_its_links_are_followed(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's cache is a folder named after the commit, full of links to blobs."""
    snapshot = tmp_path / "snapshots" / "0123abc"
    (snapshot / "transformer").mkdir(parents=True)
    for name in (
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ):
        (snapshot / name).symlink_to(tiny_pipeline / name)
    asked: list[tuple[str, object]] = []

    def download(hub_id: str, revision: str | None = None, allow_patterns: object = None) -> str:
        asked.append((hub_id, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder, source = hub.pipeline_from_model(MODELS["1.3b"], hub.TRANSFORMER_FILES)
    assert asked == [("nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", hub.TRANSFORMER_FILES)]
    assert (source.kind, source.location, source.revision) == (
        "hub",
        MODELS["1.3b"].hub_id,
        "0123abc",
    )
    checkpoint = open_checkpoint(folder, source)
    assert checkpoint.read("proj_out.bias").shape == (64,)
