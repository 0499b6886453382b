"""The process in which NVIDIA's ONNX parser reads graphs; `real_parser` starts it.

It reads `{"backend": …, "paths": […]}` from standard input. Its last line on standard output is
`{"title": …, "problems": [{"path", "node", "operator", "message"}, …]}`.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from anyflow_deploy.engines.tensorrt.library import choose_library

if TYPE_CHECKING:
    from anyflow_deploy.engines.tensorrt.api import trt


def parse_all(backend: str, paths: list[str]) -> dict[str, Any]:
    """Parse every graph; returns the answer as JSON holds it.

    Raises:
        BackendError: the library cannot be imported, or does not start here.
    """
    choose_library(backend)
    from anyflow_deploy.engines.tensorrt.api import LOGGER, TITLE, MessageLog, trt
    from anyflow_deploy.errors import BackendError

    messages = MessageLog()
    try:
        builder = trt.Builder(LOGGER)
    except TypeError:  # pybind11's word for a factory that returned nothing
        raise BackendError(f"{TITLE} does not start here: {messages.summary()}") from None
    problems: list[dict[str, str]] = []
    for path in paths:
        messages = MessageLog()
        flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flag)  # the parser does not keep it alive
        parser = trt.OnnxParser(network, LOGGER)
        if not parser.parse_from_file(path):
            problems += _problems(parser, path, messages.summary())
    return {"title": TITLE, "problems": problems}


def _problems(parser: trt.OnnxParser, path: str, otherwise: str) -> list[dict[str, str]]:
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    if not errors:
        return [{"path": path, "node": "", "operator": "", "message": otherwise}]
    return [
        {
            "path": path,
            "node": error.node_name(),
            "operator": error.node_operator(),
            "message": " ".join(error.desc().split()),
        }
        for error in errors
    ]


def main() -> None:
    """Answer the request on standard input."""
    from anyflow_deploy.errors import AnyFlowError

    request = json.load(sys.stdin)
    try:
        answer = parse_all(request["backend"], request["paths"])
    except AnyFlowError as error:
        sys.exit(str(error))
    print(json.dumps(answer))  # noqa: T201


if __name__ == "__main__":
    main()
