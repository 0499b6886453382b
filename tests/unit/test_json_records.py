"""JSON records: whole or not at all, and refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from anyflow_deploy import AnyFlowError
from anyflow_deploy.bundle.atomic_io import write_text_atomically
from anyflow_deploy.export.quantization.sensitivity import load_sensitivity
from anyflow_deploy.quantization.calibration import load_calibration

LOADERS = pytest.mark.parametrize("load", [load_calibration, load_sensitivity])


@LOADERS
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist. Make one: anyflow-"),
        (
            {"schema": 2, "something": "new"},
            "schema 2; this version reads 1. Update anyflow_deploy",
        ),
        ({"schema": 0}, "schema 0; this version reads 1. Make another: anyflow-"),
        (
            {},
            (
                "is not a (calibration|sensitivity): no JSON object with a 'schema'. Make another:"
                " anyflow-"
            ),
        ),
        ({"schema": 1}, "is damaged at '.*': field required. Make another: anyflow-"),
        ([1], "is not a (calibration|sensitivity): no JSON object"),
        ("folder", "cannot be read: Is a directory"),
    ],
)
def test_what_is_refused(
    load: Callable[[Path], object], content: object, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(AnyFlowError, match=message):
        load(path)


def test_a_file_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(tmp_path / "file.json", "\ud800")
    assert (tmp_path / "file.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
