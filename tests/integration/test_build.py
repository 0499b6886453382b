from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anyflow_deploy import (
    AnyFlowError,
    BackendError,
    Bundle,
    BundleError,
    OutputError,
    load_bundle,
    load_engine,
)
from anyflow_deploy.cli.build import BuildOptions, build, settings_from_flags
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.engines import registry
from anyflow_deploy.engines.build import BuildResult, BuildSettings, build_engine
from anyflow_deploy.engines.engine_folder import (
    ENGINE,
    DeviceRecord,
    EngineWriter,
    check_compatible,
    find_engine,
    load_engine_folder,
    narrow_ranges,
)
from anyflow_deploy.engines.registry import Backend
from anyflow_deploy.progress import Progress
from tests.conftest import Export

HERE = DeviceRecord(kind="cuda", name="NVIDIA One", compute_capability="9.0")


@dataclass(frozen=True)
class Settings(BuildSettings):
    workspace: int | None = None
    fails: bool = False

    def build(self, bundle: Bundle, writer: EngineWriter, progress: Progress) -> BuildResult:
        writer.write("engine.plan", b"plan")
        (writer.folder / "cache.bin").write_bytes(b"cache")
        writer.add_existing("cache.bin")
        if self.fails:
            raise BackendError("the compiler gave up")
        return BuildResult(
            HERE, {"maker": "1.2"}, narrow_ranges(bundle), achieved={"fp8_flops": 0.5}
        )


class MakerOptions(BuildOptions):
    workspace: int | None = None


@dataclass
class Engine:
    bundle: Bundle
    options: Any


@pytest.fixture
def bundle(small_bundle: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    row = Backend(
        "maker", f"{__name__}:Engine", {"cpu": "maker", "cuda": "maker"}, f"{__name__}:Settings"
    )
    monkeypatch.setitem(registry.BACKENDS, "maker", row)
    shutil.copytree(
        small_bundle().path, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")
    )
    return load_bundle(tmp_path / "bundle")


def run(bundle: Bundle, words: str = "") -> int:
    return build(
        parse_options(MakerOptions, [str(bundle.path), "--backend", "maker", *words.split()])
    )


def test_build_find_load(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bundle, "--workspace 7 --json") == 0
    out, shown = capsys.readouterr()
    assert "NVIDIA One" in shown and "maker 1.2" in shown and "50 %" in shown
    folder = find_engine(bundle, "maker")
    record = json.loads((folder.path / ENGINE).read_text())
    assert json.loads(out) == {"engine": str(folder.path), **record}
    assert folder.path == bundle.path / "engines" / "maker-cpu"
    assert (
        folder.file("engine.plan").read_bytes() == b"plan"
        and folder.file("cache.bin").read_bytes() == b"cache"
    )
    assert folder.record.settings["workspace"] == 7 and folder.record.bundle == bundle.digest
    assert folder.record.shape_ranges == bundle.manifest.shape_ranges
    assert load_bundle(bundle.path) == bundle, "building changes nothing in the bundle"
    engine: Any = load_engine(bundle, "maker", engine="maker-cpu", device=1)
    assert engine.options.engine == "maker-cpu" and engine.options.device == 1


def test_names_and_places(bundle: Bundle, tmp_path: Path) -> None:
    run(bundle, "--name one")
    assert find_engine(bundle, "maker").path.name == "one"
    with pytest.raises(
        OutputError,
        match=r"one exists\. Choose another --name or --output, or replace it with --overwrite",
    ):
        run(bundle, "--name one")
    run(bundle, "--name one --overwrite")
    run(bundle, "--name two")
    with pytest.raises(
        BackendError, match=r"several maker engines \(one, two\): choose one with --engine NAME"
    ):
        find_engine(bundle, "maker")
    assert find_engine(bundle, "maker", "two").path.name == "two"
    run(bundle, f"--output {tmp_path / 'elsewhere'}")
    assert find_engine(bundle, "maker", tmp_path / "elsewhere").path == tmp_path / "elsewhere"
    with pytest.raises(
        BackendError, match=r"no engine 'three'; .* has one, two\. Make one: anyflow-build"
    ):
        find_engine(bundle, "maker", "three")


def test_a_failed_build_leaves_nothing(bundle: Bundle) -> None:
    run(bundle)
    before = (bundle.path / "engines" / "maker-cpu" / ENGINE).read_bytes()
    with pytest.raises(BackendError, match="gave up"):
        build_engine(bundle, "maker", Settings(fails=True), overwrite=True)
    assert [p.name for p in (bundle.path / "engines").iterdir()] == ["maker-cpu"]
    assert (bundle.path / "engines" / "maker-cpu" / ENGINE).read_bytes() == before


def test_an_interrupted_build_leaves_nothing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> BuildResult:
        raise KeyboardInterrupt

    monkeypatch.setattr(Settings, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(bundle)
    assert not list((bundle.path / "engines").iterdir())


def test_a_folder_that_may_not_be_written(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(
        BackendError,
        match=r"engines cannot be written to\. Copy the bundle .* or give --output FOLDER",
    ):
        run(bundle)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--backend onnxruntime", "runs the bundle as it is"),
        ("--backend makr", r"unknown backend 'makr': .* Did you mean 'maker'"),
        ("--backend maker --provider gpu", "unknown provider 'gpu': allowed are cpu, cuda"),
        ("--backend maker --name a/b", r"--name is 'a/b': allowed is a plain folder name"),
        ("--backend maker --name ..", "allowed is a plain folder name"),
        ("--backend maker --name a --output b", "give one of --name NAME"),
    ],
)
def test_refusals(bundle: Bundle, words: str, message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        build(parse_options(BuildOptions, [str(bundle.path), *words.split()]))
    assert not (bundle.path / "engines").exists()


def test_a_flag_of_another_backend(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Backend(
        "other",
        f"{__name__}:Engine",
        {"cpu": "other"},
        "anyflow_deploy.engines.build:BuildSettings",
    )
    monkeypatch.setitem(registry.BACKENDS, "other", row)
    options = parse_options(
        MakerOptions, [str(bundle.path), "--backend", "other", "--workspace", "7"]
    )
    with pytest.raises(
        AnyFlowError, match="--workspace means nothing to backend other; it is a flag of .*maker"
    ):
        settings_from_flags(options)


def edited(bundle: Bundle, changes: dict[str, object]) -> None:
    path = bundle.path / "engines" / "maker-cpu" / ENGINE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 9}, "has engine schema 9; this version reads 1"),
        ({"bundle": 3}, "damaged at 'bundle'"),
        ({"surplus": 3}, "damaged at 'surplus'"),
        ({"files": {"../x": {"bytes": 1, "sha256": ""}}}, "leaves the engine's folder"),
        (
            {"files": {"y": {"bytes": 1, "sha256": ""}}},
            "lacks 'y', which its engine.json lists. Build it again",
        ),
        ({"bundle": "0" * 64}, "was built from bundle 000000000000, and .* --overwrite"),
    ],
)
def test_damaged_records(bundle: Bundle, changes: dict[str, object], message: str) -> None:
    run(bundle)
    edited(bundle, changes)
    with pytest.raises(AnyFlowError, match=message):
        find_engine(bundle, "maker")


def test_a_changed_file_is_found(bundle: Bundle) -> None:
    run(bundle)
    (bundle.path / "engines" / "maker-cpu" / "engine.plan").write_bytes(b"plot")
    with pytest.raises(BundleError, match="was changed"):
        find_engine(bundle, "maker")
    find_engine(bundle, "maker", verify=False)


def test_no_engine_yet(bundle: Bundle) -> None:
    with pytest.raises(
        BackendError,
        match=r"no maker engine yet\. Make one on this machine: anyflow-build .* --backend maker",
    ):
        find_engine(bundle, "maker")
    with pytest.raises(BundleError, match="is not an engine"):
        load_engine_folder(bundle.path)


def test_another_device_or_version_is_refused_with_both_names(bundle: Bundle) -> None:
    run(bundle)
    folder = find_engine(bundle, "maker")
    check_compatible(folder, HERE, {"maker": "1.2"})
    with pytest.raises(
        BackendError,
        match=r"built for NVIDIA One \(compute capability 9\.0\), and this is NVIDIA Two",
    ):
        check_compatible(folder, HERE.model_copy(update={"name": "NVIDIA Two"}), {})
    with pytest.raises(BackendError, match=r"built with maker 1\.2, and here is maker 1\.3"):
        check_compatible(folder, HERE, {"maker": "1.3"})
