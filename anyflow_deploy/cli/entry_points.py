"""The functions that the console scripts and `python -m anyflow_deploy.train` call.

Each answers `--version` at once. For anything else it imports its command, which takes longer.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from anyflow_deploy.cli.terminal import print_version


def _command(program: str, module: str) -> Callable[[], None]:
    """Make the function of one command.

    Args:
        program: what people type.
        module: of `anyflow_deploy.cli`, with the command's own `main`.
    """

    def main() -> None:
        if not print_version(program, sys.argv[1:]):
            importlib.import_module(f"anyflow_deploy.cli.{module}").main()

    return main


build = _command("anyflow-build", "build")
calibrate = _command("anyflow-calibrate", "calibrate")
debug = _command("anyflow-debug", "debug")
doctor = _command("anyflow-doctor", "doctor")
export = _command("anyflow-export", "export")
fit = _command("anyflow-fit", "fit")
generate = _command("anyflow-generate", "generate")
inspect = _command("anyflow-inspect", "inspect_bundle")
precompute = _command("anyflow-precompute", "precompute")
profile = _command("anyflow-profile", "profile_bundle")
sensitivity = _command("anyflow-sensitivity", "sensitivity")
serve = _command("anyflow-serve", "serve")
shapes = _command("python -m anyflow_deploy.shapes", "shapes")
train = _command("python -m anyflow_deploy.train", "train")
triton = _command("anyflow-triton", "tritonserver")
validate = _command("anyflow-validate", "validate")
