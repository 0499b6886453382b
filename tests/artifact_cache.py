"""What is expensive to make and the same for every test: made once a session, by whichever worker
asks first.

A test run has several processes. Each thing is a folder or file below one root that they share,
named after the hash of all it is made from; a file lock lets one process make it while the others
wait. Whoever makes something writes it whole or not at all. Bundles are copied into the worker's
own folder before a test sees them, because commands write reports and engines into bundles, and
because a test may damage what it was given.

Recorded graphs are shared, too. They depend on the architecture, the ranges, the base precision and
the opset, never on weights, so two checkpoints and three precisions of one architecture have one
recording. That a recording made anew gives the same bytes is a test of test_exporter, and of
test_quantize.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir
from filelock import FileLock

from anyflow_deploy.checkpoints.weights import ParameterSpec
from anyflow_deploy.export import exporter

TranslatedGraph = tuple[ir.Model, dict[str, ParameterSpec]]

translate_uncached = exporter.translate_graph


class ArtifactCache:
    """The folder that all workers of a session share; `root` is set before the first test."""

    root: Path

    def cached_path(self, label: str, inputs: object, make: Callable[[Path], object]) -> Path:
        """The path of something that `make(path)` makes where it is missing.

        Args:
            label: a word for humans who look into the folder.
            inputs: everything the result depends on, in objects whose repr says all of it.
            make: writes the path, whole or not at all.
        """
        path = self.root / f"{label}-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}"
        if not path.exists():
            with FileLock(self.root / f".{path.name}.lock"):
                if not path.exists():
                    make(path)
        return path


ARTIFACTS = ArtifactCache()


def translate_cached(*inputs: Any) -> TranslatedGraph:
    """`exporter.translate_graph`, recorded by the first who asks and read back by the others."""
    *label, _ = inputs  # the last is where progress goes
    folder = ARTIFACTS.cached_path(
        "graph", label, lambda path: _write(path, translate_uncached(*inputs))
    )
    return _read(folder)


def _write(folder: Path, translated: TranslatedGraph) -> None:
    model, parameters = translated
    for name, value in model.graph.initializers.items():  # what has no data is not serialized
        assert value.const_value is None or isinstance(value.const_value, ir.TensorProtocol)
        assert value.dtype is not None and value.shape is not None
        value.const_value = ir.ExternalTensor(
            "nowhere", 0, 0, value.dtype, shape=ir.Shape(value.shape), name=name
        )
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(exist_ok=True)  # of a worker that was killed
    (partial / "model.onnx").write_bytes(ir.serde.serialize_model(model).SerializeToString())
    (partial / "parameters.json").write_text(
        json.dumps({name: asdict(p) for name, p in parameters.items()})
    )
    partial.rename(folder)


def _read(folder: Path) -> TranslatedGraph:
    model = ir.load(folder / "model.onnx")
    for value in model.graph.initializers.values():
        value.const_value = None
    raw = json.loads((folder / "parameters.json").read_text())
    return model, {name: ParameterSpec(p["type"], tuple(p["shape"])) for name, p in raw.items()}
