"""What the tests share: the golden vectors, a tiny pipeline, and bundles exported once a session.

Exports take about ten seconds each, so each kind is made once, and tests that damage a bundle copy it first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from anyflow_deploy import MODELS, Bundle
from anyflow_deploy.export.checkpoint import open_checkpoint
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.export.tiny import save_tiny_pipeline

GOLDEN = Path(os.environ.get("ANYFLOW_GOLDEN") or Path(__file__).parent / "golden") / "bidirectional"


@pytest.fixture(scope="session")
def golden() -> dict[str, NDArray[np.float32]]:
    """The golden tensors."""
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Exports the golden model with given settings, once for each."""
    made: dict[str, Bundle] = {}
    folder = tmp_path_factory.mktemp("golden")

    def bundle(precision: str = "fp32", opset: int = 20, target: str = "cpu") -> Bundle:
        key = f"{precision}-{opset}"
        if key not in made:
            settings = ExportSettings(precision, opset=opset, target=target)
            made[key] = export_bundle(open_checkpoint(GOLDEN), folder / key, settings)
        return made[key]

    return bundle


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny pipeline, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    save_tiny_pipeline(MODELS["tiny"], folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_pipeline: Path) -> Bundle:
    """The tiny pipeline's bundle, float32."""
    return export_bundle(open_checkpoint(tiny_pipeline), tiny_pipeline.parent / "bundle")


@pytest.fixture
def golden_config() -> dict[str, object]:
    """The golden model's config.json."""
    return json.loads((GOLDEN / "config.json").read_text())
