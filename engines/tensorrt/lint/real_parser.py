"""Ask NVIDIA's own ONNX parser whether it takes a graph, where one is installed.

    for problem in parse_graphs([Path("transition.onnx")]): print(problem.message)

The parsers of TensorRT and of TensorRT for RTX need the library. TensorRT for RTX's works on a
machine without a GPU; TensorRT's needs one. The parser runs in a process of its own, so that a
crash of it is an answer, too, and this process stays free to choose either library.

This module imports neither library.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anyflow_deploy.engines.tensorrt.library import LIBRARIES
from anyflow_deploy.errors import BackendError

_PROGRAM = "anyflow_deploy.engines.tensorrt.lint.parser_process"
_SECONDS = 900.0
"""A parser reads the weights of every graph; those of the largest model from a slow disk."""


@dataclass(frozen=True)
class ParserProblem:
    """What a parser refuses.

    Attributes:
        path: the graph.
        node: name of the node; empty where the parser names none.
        operator: the node's operator; empty where the parser names none.
        message: the parser's own words.
    """

    path: Path
    node: str
    operator: str
    message: str


@dataclass(frozen=True)
class ParserAnswer:
    """What one parser says of some graphs.

    Attributes:
        title: the library with its version, as "TensorRT for RTX 1.7.1.116".
        problems: what it refuses; empty where it takes every graph.
    """

    title: str
    problems: tuple[ParserProblem, ...]


def installed_parsers() -> list[str]:
    """Return the backends whose library can be imported here, by their names in `LIBRARIES`."""
    rows = LIBRARIES.values()
    return [row.backend for row in rows if importlib.util.find_spec(row.module) is not None]


def parse_graphs(paths: Sequence[Path], backend: str) -> ParserAnswer:
    """Let a parser read graphs, with their weights.

    Args:
        paths: ONNX files; their external data lies beside them.
        backend: a name from `installed_parsers`.

    Raises:
        BackendError: the library does not start on this machine, or the parser crashed.
    """
    request = {"backend": backend, "paths": [str(path.resolve()) for path in paths]}
    title = LIBRARIES[backend].title
    try:
        done = subprocess.run(
            [sys.executable, "-m", _PROGRAM],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BackendError(
            f"the parser of {title} gave no answer within {_SECONDS:.0f} s."
        ) from None
    last = done.stdout.strip().splitlines()[-1:]
    if done.returncode or not last:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise BackendError(f"the parser of {title} could not be asked: {reason[0]}")
    answer = json.loads(last[0])
    problems = tuple(
        ParserProblem(Path(item["path"]), item["node"], item["operator"], item["message"])
        for item in answer["problems"]
    )
    return ParserAnswer(answer["title"], problems)
