"""Files beside the code: changelog, citation, container, workflow and forms say what is true."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from anyflow_deploy import __version__
from tests.integration.test_packaging import build

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
RELEASE = re.compile(r"^## (Unreleased|\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d)$")
KINDS = ("Added", "Changed", "Deprecated", "Fixed", "Removed", "Security")


def read_yaml(path: Path) -> Any:
    """Read a YAML file; `on:` is a text in it, as it is to GitHub."""
    return yaml.load(path.read_text(), Loader=yaml.BaseLoader)


def list_make_targets() -> set[str]:
    """List the Makefile's targets."""
    return set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))


def list_workflow_commands() -> list[str]:
    """List what the workflow's steps run, once for each value of the matrix."""
    commands = []
    for job in read_yaml(WORKFLOW)["jobs"].values():
        targets = job.get("strategy", {}).get("matrix", {}).get("target", [""])
        runs = [step["run"] for step in job["steps"] if "run" in step]
        commands += [
            run.replace("${{ matrix.target }}", target) for run in runs for target in targets
        ]
    return commands


# Version and changelog


def test_the_version_is_written_in_one_python_file() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert not re.search(r"^version = ", project, re.MULTILINE)
    assert __version__ not in (ROOT / "anyflow_deploy" / "__init__.py").read_text()


def test_the_changelog_is_by_releases() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    releases = [line for line in lines if line.startswith("## ")]
    assert [line for line in releases if not RELEASE.match(line)] == []
    dates = [line.split(" - ")[1] for line in releases if line != "## Unreleased"]
    assert dates == sorted(dates, reverse=True)
    kinds = [line.removeprefix("### ") for line in lines if line.startswith("### ")]
    assert set(kinds) <= set(KINDS)


def test_the_changelog_has_short_entries() -> None:
    """An entry begins with a dash and has two lines at most."""
    text = (ROOT / "CHANGELOG.md").read_text().split("\n## ", 1)[1]
    lines = [line for line in text.splitlines()[1:] if line and not line.startswith("#")]
    assert [line for line in lines if not line.startswith(("- ", "  ")) or len(line) > 100] == []
    assert [
        pair for pair in itertools.pairwise(lines) if all(line.startswith("  ") for line in pair)
    ] == []


def test_changelog_and_citation_name_this_version() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    (heading,) = [line for line in lines if line.startswith(f"## {__version__} - ")]
    citation = read_yaml(ROOT / "CITATION.cff")
    assert citation["version"] == __version__
    assert citation["date-released"] == heading.split(" - ")[1]
    assert any("2605.13724" in reference["url"] for reference in citation["references"])


# Workflow, hooks and forms


def test_the_workflow_calls_make_alone() -> None:
    commands = list_workflow_commands()
    assert "make test" in commands
    assert [command for command in commands if not re.fullmatch(r"make [a-z-]+", command)] == []
    assert {command.split()[1] for command in commands} <= list_make_targets()


def test_the_workflow_runs_every_supported_python_and_arm() -> None:
    matrix = read_yaml(WORKFLOW)["jobs"]["test"]["strategy"]["matrix"]
    project = (ROOT / "pyproject.toml").read_text()
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)", project)
    assert any(row["runner"].endswith("-arm") for row in matrix["include"])


def test_the_hooks_call_make() -> None:
    hooks = [
        hook
        for repo in read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
        for hook in repo["hooks"]
    ]
    assert {hook["entry"] for hook in hooks} == {"make format", "make lint"}
    assert {hook["entry"].split()[1] for hook in hooks} <= list_make_targets()


def test_lint_covers_every_form_and_workflow() -> None:
    workflows = [path for path in WORKFLOW.parent.iterdir() if path.suffix in (".yml", ".yaml")]
    for path in [*FORMS, *workflows, ROOT / "Dockerfile", ROOT / "CITATION.cff"]:
        name = re.escape(str(path.relative_to(ROOT)))
        assert re.search(rf"^\t\$\(.* {name}\b", MAKEFILE, re.MULTILINE)


def test_the_forms_name_commands_that_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for path in FORMS:
        for command in re.findall(r"anyflow-[a-z]+", path.read_text()):
            assert f"{command} = " in project


def test_the_oldest_versions_are_tested_with_files_that_exist() -> None:
    listed = re.search(r"^OLDEST_NAMES := ((.|\\\n)*)$", MAKEFILE, re.MULTILINE)
    assert listed is not None
    stems = listed[1].replace("\\", "").split()
    assert [stem for stem in stems if len(list(ROOT.glob(f"tests/*/test_{stem}.py"))) != 1] == []
    assert "engine" in stems


# Container


def test_the_container_serves() -> None:
    entry = re.search(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    assert entry is not None
    assert yaml.safe_load(entry[1]) == ["anyflow-serve"]
    last_user = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)[-1]
    assert last_user == "1000"


def test_the_containers_command_is_one_of_anyflow_serve() -> None:
    from anyflow_deploy.cli.options import parse_options
    from anyflow_deploy.cli.serve import ServeOptions

    (command,) = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    options = parse_options(ServeOptions, yaml.safe_load(command))
    assert (str(options.bundle), options.host) == ("/bundle", "0.0.0.0")
    assert f"EXPOSE {options.port}\n" in DOCKERFILE


def test_the_containers_context_builds_the_wheel(tmp_path: Path) -> None:
    """.dockerignore lets through what hatchling needs, and no tests."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    context = tmp_path / "context"
    context.mkdir()
    for name in (line.removeprefix("!/") for line in lines if line.startswith("!/")):
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, context / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, context)
    wheel = build("wheel", context, tmp_path / "wheel")
    assert wheel.name == f"anyflow_deploy-{__version__}-py3-none-any.whl"
    for name in re.findall(r"^COPY (?!\. )(\S+) ", DOCKERFILE, re.MULTILINE):
        assert (context / name).exists()


@pytest.mark.parametrize("runtime", ["cpu", "gpu"])
def test_the_containers_extras_exist(runtime: str) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"\[\$\{RUNTIME\},([a-z,]+)\]", DOCKERFILE)
    assert extras is not None
    for extra in (runtime, *extras[1].split(",")):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


# Environment


def test_every_environment_variable_is_documented() -> None:
    folders = [ROOT / name for name in ("anyflow_deploy", "engines", "export", "training", "tests")]
    text = (ROOT / "docs" / "reference" / "environment.md").read_text()
    for folder in folders:
        for path in folder.rglob("*.py"):
            named = set(re.findall(r"\"(ANYFLOW_[A-Z_]+)\"", path.read_text())) - {"ANYFLOW_PYTHON"}
            assert [name for name in named if f"`{name}`" not in text] == []
    assert "ANYFLOW_CACHE" in (ROOT / "README.md").read_text()


def test_the_cache_is_where_the_variable_says(tmp_path: Path) -> None:
    code = "from anyflow_deploy.checkpoints.hub import cache_folder; print(cache_folder())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"ANYFLOW_CACHE": str(tmp_path), "PATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path)
