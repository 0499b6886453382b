"""benchmarks/gpu_suite.py: every part ends with a result or with the reason why it has none."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ENGINE = "aotinductor:bf16"


@pytest.fixture
def suite_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu_suite")


@pytest.fixture
def suite(suite_module: Any, tmp_path: Path) -> Iterator[Any]:
    options = suite_module.read_options(
        ["--device", "cpu", "--output", str(tmp_path / "gpu.json"), "--patience", "1"]
    )
    suite = suite_module.Suite(options, tmp_path)
    yield suite
    suite.finish()


def run_script(suite: Any, part: Any, code: str, limit: float = 60, module: str = "") -> Any:
    """Run a part whose script is `code`."""
    script = suite.options.output.parent / "script.py"
    script.write_text(code)
    return suite._run_part(part("part", (str(script),), limit, module))


def test_the_json_line_of_a_part_is_its_result(suite: Any, suite_module: Any) -> None:
    line = json.dumps({"benchmark": "x", "machine": {}, "ms": 3})
    outcome = run_script(suite, suite_module.Part, f"print('noise')\nprint({line!r})")
    assert outcome["ms"] == 3 and "machine" not in outcome


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit('no such device')", "exit status 1"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("print('no JSON')", "exit status 0"),
    ],
)
def test_a_part_that_fails_says_how(suite: Any, suite_module: Any, code: str, reason: str) -> None:
    assert run_script(suite, suite_module.Part, code)["not_run"] == reason


def test_the_end_of_the_output_of_a_part_that_failed_is_kept(suite: Any, suite_module: Any) -> None:
    outcome = run_script(suite, suite_module.Part, "raise SystemExit('no such device')")
    assert "no such device" in outcome["output"]


def test_a_part_that_hangs_is_killed(suite: Any, suite_module: Any) -> None:
    outcome = run_script(suite, suite_module.Part, "import time; time.sleep(600)", limit=6)
    assert outcome["not_run"] == "killed after its limit of 6 s"


def test_what_is_not_installed_is_named(suite: Any, suite_module: Any) -> None:
    outcome = run_script(suite, suite_module.Part, "", module="no_such_module")
    assert outcome == {"not_run": "no_such_module is not installed"}


def test_a_package_that_is_not_installed_ends_it_before_the_parts(
    suite_module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    output = tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match=r"not installed here.*pip install .*-e \."):
        suite_module.main(["--device", "cpu", "--output", str(output)])
    assert not output.exists()


def test_no_part_starts_after_the_budget(suite: Any, suite_module: Any) -> None:
    suite.options.budget = 0
    outcome = run_script(suite, suite_module.Part, "")
    assert outcome == {"not_run": "no time was left"}


def test_the_builds_leave_time_for_what_is_timed(
    suite: Any, suite_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the result file is whole after every part."""
    reserves: dict[str, float] = {}

    def run(part: Any, reserve: float = 0) -> dict[str, Any]:
        reserves[part.name] = reserve
        return {"not_run": part.not_run or "not in this test"}

    monkeypatch.setattr(suite, "_run_part", run)
    suite.run()
    assert reserves[f"build {ENGINE}"] == reserves[f"golden {ENGINE} causal"] > 0
    assert reserves["ceilings"] == reserves["whole beside torch.compile"] == 0
    parts = json.loads(suite.options.output.read_text())["parts"]
    assert set(reserves) == set(parts)
    assert parts["whole"] == {"not_run": "no engine was built for it"}


def test_an_engine_that_was_not_built_is_not_timed(
    suite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = {"build-whole": {ENGINE: {"build_seconds": 1}}, "seconds": 1}
    arguments: dict[str, Any] = {}

    def run(part: Any, reserve: float = 0) -> dict[str, Any]:
        arguments[part.name] = part.arguments
        return built if part.name == f"build {ENGINE}" else {"not_run": "ended by SIGSEGV"}

    monkeypatch.setattr(suite, "_run_part", run)
    suite.run()
    assert arguments["whole"][arguments["whole"].index("--engines") + 1] == ENGINE


def test_parts_that_were_not_reached_say_so(
    suite_module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After Ctrl-C, or when the machine is taken away."""

    def run(self: Any, part: Any, reserve: float = 0) -> dict[str, Any]:
        if part.name == "train_step":
            raise KeyboardInterrupt
        return {"seconds": 1}

    monkeypatch.setattr(suite_module.Suite, "_run_part", run)
    output = tmp_path / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        suite_module.main(["--device", "cpu", "--output", str(output), "--skip", "golden"])
    parts = json.loads(output.read_text())["parts"]
    assert parts.pop("ceilings") == {"seconds": 1}
    assert parts.pop("whole") == {"not_run": "the suite was ended before it"}
    assert {f"build {ENGINE}", "causal", "train_step"} < set(parts) and "golden" not in str(parts)
    assert all(outcome["not_run"] for outcome in parts.values())
