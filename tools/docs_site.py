"""A hook of mkdocs (mkdocs.yml names it) that generates pages from the code.

- reference/commands/: a page for each command, from its options class, which is also what `--help`
  prints.
- reference/python.md: each name in `anyflow_deploy.__all__`, for mkdocstrings to fill in.
- explanation/architecture.md: ARCHITECTURE.md, which is at the top of the repository.

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
from anyflow_deploy.cli.generate_options import GenerateOptions
from anyflow_deploy.cli.inspect_bundle import InspectOptions
from anyflow_deploy.cli.options import Options, build_help
from anyflow_deploy.cli.precompute import PrecomputeOptions
from anyflow_deploy.cli.profile_bundle import ProfileOptions
from anyflow_deploy.cli.sensitivity import SensitivityOptions
from anyflow_deploy.cli.serve import ServeOptions
from anyflow_deploy.cli.train import PROGRAM, make_options_type
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
"""Headings of the Python page. A public name that is not listed here is put under "More"."""


def command_page(command: str, options: type[Options]) -> str:
    """Return a command's help as Markdown: usage, description, a table of its flags, examples."""
    usage, _, about, _, flags, _, *examples = build_help(command, options)
    usage_text = re.sub(r"\\?\[/?[a-z ]*\]", "", usage.replace("\\[flags]", "FLAGS")).replace(
        "usage: ", ""
    )
    rows = ["| flag | value | |", "|---|---|---|"]
    columns = [[_cell(text) for text in column.cells] for column in flags.columns]
    rows += [f"| `{name}` | {kind} | {text} |" for name, kind, text in zip(*columns, strict=True)]
    examples_text = "\n".join(example.strip() for example in examples)
    parts = [f"# {command}", f"```text\n{usage_text}\n```", _paragraphs(about), "\n".join(rows)]
    if examples_text:
        parts.append(f"## Examples\n\n```sh\n{examples_text}\n```")
    return "\n\n".join(parts) + "\n"


def _paragraphs(text: str) -> str:
    """Mark words such as --steps as code, so that no two dashes become one."""
    return re.sub(r"(?<![\w`-])(--[a-z][a-z-]*)", r"`\1`", inspect.cleandoc(text))


def _cell(text: object) -> str:
    clean = re.sub(r"\[/?dim\]|\[/\]", "", str(text)).replace("\\[", "[")
    return _paragraphs(clean.replace("|", "\\|")) if not clean.startswith("--") else clean


def python_page() -> str:
    """Return directives of mkdocstrings for every public name, under headings."""
    public = [name for name in anyflow_deploy.__all__ if name != "__version__"]
    names_by_title = {
        title: [name for name in names if name in public] for title, names in GROUPS.items()
    }
    grouped_names = {name for names in GROUPS.values() for name in names}
    names_by_title["More"] = [name for name in public if name not in grouped_names]
    parts = [
        "# Python API",
        "`from anyflow_deploy import …`: these names are the public interface.",
    ]
    for title, names in names_by_title.items():
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
    """Return ARCHITECTURE.md with its links as seen from docs/explanation/."""
    return re.sub(r"\]\(docs/", "](../", (ROOT / "ARCHITECTURE.md").read_text())


def generated_pages() -> dict[str, str]:
    """Return every page that is generated, by its path in docs/."""
    train = make_options_type()
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
