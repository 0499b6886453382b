"""What scripts read: JSON documents, exit statuses and versions, and the pages that list them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import anyflow_deploy
from anyflow_deploy.cli import entry_points
from anyflow_deploy.cli.doctor_options import DoctorOptions
from anyflow_deploy.cli.fit import FitOptions, fit
from anyflow_deploy.cli.json_output import print_json, reserve_stdout
from anyflow_deploy.cli.options import (
    DONE,
    INTERRUPTED,
    USAGE_ERROR,
    WORK_ERROR,
    Options,
    parse_options,
)
from anyflow_deploy.cli.profile_bundle import ProfileOptions
from anyflow_deploy.cli.serve import ServeOptions
from tests.json_reference import PAGE, documented_fields
from tools.docs_site import COMMANDS

ROOT = Path(__file__).parents[2]
EXIT_STATUS = (ROOT / "docs" / "reference" / "exit-status.md").read_text()


def test_every_command_with_a_result_has_json_and_a_section() -> None:
    reporting = {name for name, options in COMMANDS.items() if options is not ServeOptions}
    assert set(re.findall(r"^## (anyflow-[\w-]+)$", PAGE, re.MULTILINE)) == reporting
    for name in reporting:
        flags = {field.alias or key for key, field in COMMANDS[name].model_fields.items()}
        assert "json" in flags, name


def test_a_document_is_the_only_thing_on_standard_output() -> None:
    """Python, C and child processes print, too."""
    program = (
        "import ctypes, subprocess, sys\n"
        "from anyflow_deploy.cli.json_output import print_json, reserve_stdout\n"
        "with reserve_stdout():\n"
        "    print('from Python')\n"
        "    ctypes.CDLL(None).puts(b'from C')\n"
        "    ctypes.CDLL(None).fflush(None)\n"
        "    subprocess.run(['echo', 'from a child'], check=True)\n"
        "    print_json({'a': 'é'})\n"
        "print('afterwards')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b'{\n "a": "\\u00e9"\n}\nafterwards\n'
    assert sorted(done.stderr.splitlines()) == [b"from C", b"from Python", b"from a child"]


def test_json_has_no_number_that_is_none() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"psnr": float("inf")})


def test_standard_output_comes_back_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with reserve_stdout():
            sys.stdout.write("hidden")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    sys.stdout.write("seen")
    assert capsys.readouterr() == ("seen", "hidden")


def test_fit_prints_the_documented_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(parse_options(FitOptions, ["--model", "tiny", "--json"])) == 0
    assert set(json.loads(capsys.readouterr().out)) == documented_fields("anyflow-fit")


def test_the_doctor_prints_the_documented_fields() -> None:
    from anyflow_deploy.doctor.report import report_json

    assert set(report_json({}, [], {})) == documented_fields("anyflow-doctor")
    assert parse_options(DoctorOptions, ["--json"]).prints_json


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("b --json", "-"),
        ("b --json --steps 1", "-"),
        ("b --json=-", "-"),
        ("b --json p.json", "p.json"),
        ("--json=p.json b", "p.json"),
        ("b", None),
    ],
)
def test_a_profile_goes_to_a_file_or_to_standard_output(line: str, file: str | None) -> None:
    options = parse_options(ProfileOptions, line.split())
    assert (options.json_file, options.prints_json) == (file, file == "-")
    assert str(options.bundle) == "b"


# Exit statuses


def test_the_page_has_the_statuses_of_the_code() -> None:
    table = EXIT_STATUS.split("| status | meaning |", 1)[1].split("## Verdicts")[0]
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", table, re.MULTILINE))
    assert list(map(int, rows)) == [DONE, WORK_ERROR, USAGE_ERROR, INTERRUPTED]
    for status, word in (
        (DONE, "done"),
        (WORK_ERROR, "error"),
        (USAGE_ERROR, "flags"),
        (INTERRUPTED, "SIGTERM"),
    ):
        assert word in rows[str(status)]


def test_the_page_has_the_verdicts_of_the_code() -> None:
    rows = dict(re.findall(r"^\| `(anyflow-[\w-]+)` \| (.*) \|$", EXIT_STATUS, re.MULTILINE))
    verdicts = {name: o.VERDICT for name, o in COMMANDS.items() if o.VERDICT}
    assert {name: text.replace("`", "") for name, text in rows.items()} == verdicts


class Judging(Options):
    """Judge."""

    VERDICT = "it is bad"


def test_the_help_has_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from anyflow_deploy.cli.options import run

    monkeypatch.setattr(sys, "argv", ["judge", "--help"])
    with pytest.raises(SystemExit):
        run("judge", Judging, lambda options: pytest.fail("work was started"))
    assert "Exit status 1, beside errors: it is bad." in " ".join(capfd.readouterr().out.split())


# Versions


def test_every_script_begins_in_the_entry_points() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    scripts = dict(
        re.findall(
            r'^(anyflow-[\w-]+) = "anyflow_deploy\.cli\.entry_points:(\w+)"$', project, re.MULTILINE
        )
    )
    assert set(scripts) == set(COMMANDS)


NAMES = [*COMMANDS, "python -m anyflow_deploy.train", "python -m anyflow_deploy.shapes"]


@pytest.mark.parametrize("program", NAMES)
def test_each_entry_point_answers_version_or_imports_its_command(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = getattr(entry_points, re.split(r"[-.]", program)[-1])
    imported: list[str] = []

    def fake_import(name: str) -> SimpleNamespace:
        imported.append(name)
        return SimpleNamespace(main=lambda: None)

    monkeypatch.setattr(entry_points.importlib, "import_module", fake_import)
    monkeypatch.setattr(sys, "argv", [program, "bundle", "--version"])
    main()
    assert capsys.readouterr() == (f"{program} {anyflow_deploy.__version__}\n", "")
    assert imported == []
    monkeypatch.setattr(sys, "argv", [program, "--prompt=--version"])
    main()
    (name,) = imported
    assert (ROOT / f"{name.replace('.', '/')}.py").is_file()
    assert f'"{program}"' in (ROOT / f"{name.replace('.', '/')}.py").read_text()


def test_the_version_needs_no_other_package() -> None:
    program = (
        "import sys\n"
        "sys.argv = ['anyflow-generate', '--version']\n"
        "from anyflow_deploy.cli.entry_points import generate\n"
        "generate()\n"
        "heavy = {'numpy', 'pydantic', 'rich', 'fire', 'torch', 'anyflow_deploy.cli.options'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"anyflow-generate {anyflow_deploy.__version__}\n[]\n"


@pytest.mark.parametrize("module", ["train", "shapes"])
def test_modules_answer_version(module: str) -> None:
    words = [sys.executable, "-m", f"anyflow_deploy.{module}", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    version = anyflow_deploy.__version__
    assert (done.stdout, done.stderr) == (f"python -m anyflow_deploy.{module} {version}\n", "")
