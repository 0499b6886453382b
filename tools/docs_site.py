"""A hook of mkdocs (mkdocs.yml names it): pages that are made from the code, so that they cannot
fall behind it.

- reference/commands/: a page for each command, from its options class, which is also what `--help`
  prints.
- reference/python.md: each name in `anyflow_deploy.__all__`, for mkdocstrings to fill in.
- explanation/architecture.md: ARCHITECTURE.md, which lives at the top of the repository.

Links from a page to a file outside docs/ work on a code host, but not on the site: there they
become the path as code.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import anyflow_deploy
from anyflow_deploy.cli.build import BuildOptions
from anyflow_deploy.cli.calibrate import CalibrateOptions
from anyflow_deploy.cli.debug import DebugOptions
from anyflow_deploy.cli.doctor_options import DoctorOptions
from anyflow_deploy.cli.export import ExportOptions
from anyflow_deploy.cli.fit import FitOptions
from anyflow_deploy.cli.generate import GenerateOptions
from anyflow_deploy.cli.inspect_bundle import InspectOptions
from anyflow_deploy.cli.options import Options, help_of
from anyflow_deploy.cli.precompute import PrecomputeOptions
from anyflow_deploy.cli.profile_bundle import ProfileOptions
from anyflow_deploy.cli.sensitivity import SensitivityOptions
from anyflow_deploy.cli.serve import ServeOptions
from anyflow_deploy.cli.train import PROGRAM, full_options
from anyflow_deploy.cli.tritonserver import TritonOptions
from anyflow_deploy.cli.validate import ValidateOptions

ROOT = Path(__file__).parents[1]

COMMANDS: dict[str, type[Options]] = {
    "anyflow-build": BuildOptions,
    "anyflow-calibrate": CalibrateOptions,
    "anyflow-debug": DebugOptions,
    "anyflow-doctor": DoctorOptions,
    "anyflow-export": ExportOptions,
    "anyflow-fit": FitOptions,
    "anyflow-generate": GenerateOptions,
    "anyflow-inspect": InspectOptions,
    "anyflow-precompute": PrecomputeOptions,
    "anyflow-profile": ProfileOptions,
    "anyflow-sensitivity": SensitivityOptions,
    "anyflow-serve": ServeOptions,
    "anyflow-triton": TritonOptions,
    "anyflow-validate": ValidateOptions,
}
"""Every console script; tests/unit/test_docs.py compares this with pyproject.toml."""

GROUPS = {
    "Video": ("VideoPipeline", "Video", "VideoChunk", "GenerationReport"),
    "Bundles and engines": ("Bundle", "load_bundle", "Engine", "Run", "load_engine"),
    "Sampling": ("sample", "stream", "noise", "Chunk", "Step", "Schedule"),
    "Deadlines and target quality": ("Deadline", "StepTimer", "AdaptiveSteps", "AdaptiveResult"),
    "Models": ("MODELS", "Model", "Architecture"),
    "Errors": ("AnyFlowError", "BackendError", "BundleError", "CheckpointError", "ShapeError"),
}
"""Headings of the page on Python; a public name that is not here stands under "More"."""


def command_page(command: str, options: type[Options]) -> str:
    """A command's help as Markdown: usage, what it does, a table of its flags, examples."""
    usage, _, about, _, flags, _, *examples = help_of(command, options)
    plain = re.sub(r"\\?\[/?[a-z ]*\]", "", usage.replace("\\[flags]", "FLAGS")).replace(
        "usage: ", ""
    )
    rows = ["| flag | value | |", "|---|---|---|"]
    columns = [[_cell(text) for text in column.cells] for column in flags.columns]
    rows += [f"| `{name}` | {kind} | {text} |" for name, kind, text in zip(*columns, strict=True)]
    shown = "\n".join(example.strip() for example in examples)
    parts = [f"# {command}", f"```text\n{plain}\n```", _paragraphs(about), "\n".join(rows)]
    return "\n\n".join([*parts, f"## Examples\n\n```sh\n{shown}\n```"] if shown else parts) + "\n"


def _paragraphs(text: str) -> str:
    """The text with words such as --steps as code, so that no two dashes become one."""
    return re.sub(r"(?<![\w`-])(--[a-z][a-z-]*)", r"`\1`", inspect.cleandoc(text))


def _cell(text: object) -> str:
    clean = re.sub(r"\[/?dim\]|\[/\]", "", str(text)).replace("\\[", "[")
    return _paragraphs(clean.replace("|", "\\|")) if not clean.startswith("--") else clean


def python_page() -> str:
    """Directives of mkdocstrings for every public name, under headings."""
    public = [name for name in anyflow_deploy.__all__ if name != "__version__"]
    grouped = {title: [name for name in names if name in public] for title, names in GROUPS.items()}
    known = {name for names in GROUPS.values() for name in names}
    grouped["More"] = [name for name in public if name not in known]
    parts = [
        "# Python API",
        "`from anyflow_deploy import …`: these names are the public interface.",
    ]
    for title, names in grouped.items():
        if names:
            parts += [
                f"## {title}",
                *(
                    f"::: anyflow_deploy.{name}\n    options:\n      heading_level: 3"
                    for name in names
                ),
            ]
    return "\n\n".join(parts) + "\n"


def architecture_page() -> str:
    """ARCHITECTURE.md with its links as seen from docs/explanation/."""
    return re.sub(r"\]\(docs/", "](../", (ROOT / "ARCHITECTURE.md").read_text())


def generated_pages() -> dict[str, str]:
    """Every page that is made here, by its path in docs/."""
    train = full_options()
    pages = {
        f"reference/commands/{name}.md": command_page(name, options)
        for name, options in COMMANDS.items()
    }
    pages["reference/commands/train.md"] = command_page(PROGRAM, train)
    pages["reference/python.md"] = python_page()
    pages["explanation/architecture.md"] = architecture_page()
    return pages


def on_files(files: Any, config: Any) -> Any:
    """Add the pages (mkdocs calls this)."""
    from mkdocs.structure.files import File

    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links that leave docs/ into code (mkdocs calls this)."""
    depth = page.file.src_uri.count("/") + 1
    return re.sub(rf"\[([^]]*)\]\((?:\.\./){{{depth}}}([^)]+)\)", r"\1 (`\2`)", markdown)
