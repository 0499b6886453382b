"""The documents name what there is: files, modules, classes, functions, commands, flags, links and
their anchors.

What the documents' commands do is tested elsewhere (tests/integration/test_promises.py and the
tests of each page). The site itself is built by `make docs`, strictly; here are its generated
pages, which need no mkdocs.
"""

from __future__ import annotations

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest

import anyflow_deploy
from anyflow_deploy.cli.options import parse_options
from tools.docs_site import COMMANDS, generated_pages

ROOT = Path(__file__).parents[2]
CODE = (
    "anyflow_deploy",
    "benchmarks",
    "engines",
    "examples",
    "export",
    "tests",
    "tools",
    "training",
)
SUFFIXES = {".c", ".cpp", ".cu", ".h", ".hpp", ".html", ".js", ".py", ".toml", ".txt", ".yml"}

DOCUMENTS = [ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING", "SECURITY")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "examples").rglob("README.md"))
each_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)

FOREIGN_NAMES = {
    "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "IKVCacheUpdateLayer", "INVALID_ARG",
    "MALLOC_ARENA_MAX", "MAXN_SUPER", "add_kv_cache_update",
}  # fmt: skip
"""Of other projects, and no word of our code."""

FOREIGN_FLAGS = {
    "--build", "--fan", "--from-source", "--gpus", "--install", "--model-repository", "--nnodes",
    "--nproc-per-node", "--prefix",
    "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--rm", "--shm-size", "--standalone",
    "--strict", "--system-site-packages",
    "--user", "--exclude", "--tiny", "--work", "--picture", "--processes", "--aotinductor",
    "--embeds", "--videos", "--modle", "--negative-prompt",
}  # fmt: skip
"""Of other programs: docker, torchrun, cmake, the C++ examples, benchmarks."""


@functools.cache
def sources() -> dict[str, str]:
    """Text of every source file, by its path from the top."""
    files = (
        path for folder in CODE for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES
    )
    found = {str(path.relative_to(ROOT)): path.read_text(errors="ignore") for path in files}
    return found | {
        name: (ROOT / name).read_text()
        for name in ("Makefile", "pyproject.toml", "mkdocs.yml", "Dockerfile")
    }


@functools.cache
def known_words() -> set[str]:
    own = {path: text for path, text in sources().items() if not path.endswith("test_docs.py")}
    words = set(re.findall(r"\w+", "\n".join(own.values())))
    return words | {f"anyflow_{word}" for word in words}  # metrics are named so


def code_spans(text: str) -> list[str]:
    without_blocks = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", without_blocks)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def module_defines(dotted: str) -> bool:
    """Whether anyflow_deploy.a.b.Name is a module, or a name that its module defines or gives
    on."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:cut])
        file = (
            place.with_suffix(".py")
            if place.with_suffix(".py").is_file()
            else place / "__init__.py"
        )
        if file.is_file():
            return cut == len(parts) or parts[cut] in re.findall(r"\w+", file.read_text())
    return False


@each_document
def test_every_module_that_a_document_names_exists(path: Path) -> None:
    dotted = set(re.findall(r"\banyflow_deploy(?:\.\w+)+", path.read_text()))
    assert not [name for name in dotted if not module_defines(name)]


@each_document
def test_every_file_that_a_document_names_exists(path: Path) -> None:
    names = {
        name
        for span in code_spans(path.read_text())
        for name in re.findall(r"[\w./-]+\.(?:py|cpp|hpp|h|c)\b", span)
    }
    foreign = {"docs/operators.md", "docs/Changelog.md", "NvInferImpl.h"}
    assert not [
        name
        for name in names - foreign
        if not any(f"/{known}".endswith(f"/{name}") for known in sources())
    ]


@each_document
def test_every_name_in_code_font_exists(path: Path) -> None:
    """Names with an underscore or a capital letter: classes, functions, constants, fields,
    environment variables."""
    spans = [re.sub(r"\(.*\)$", "", span) for span in code_spans(path.read_text())]
    names = {
        part for span in spans if re.fullmatch(r"[A-Za-z_][\w.]*", span) for part in span.split(".")
    }
    spelled = {
        name for name in names if "_" in name or re.search(r"[a-z][A-Z]|^[A-Z][a-z]+$", name)
    }
    unknown = sorted(spelled - known_words() - FOREIGN_NAMES)
    assert not unknown


@each_document
def test_what_a_documents_python_imports_exists(path: Path) -> None:
    for block in blocks(path.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").split(".")[0] == "anyflow_deploy"
            ):
                names = {n.name for n in node.names}
                assert not [
                    name for name in names if not module_defines(f"{node.module}.{name}")
                ], block


@each_document
def test_every_flag_that_a_document_names_exists(path: Path) -> None:
    fields = [field for options in COMMANDS.values() for field in options.model_fields.items()]
    options = {f"--{(field.alias or name).replace('_', '-')}" for name, field in fields}
    options |= set(re.findall(r"--[a-z][a-z-]+", generated_pages()["reference/commands/train.md"]))
    spans = "\n".join(code_spans(path.read_text()))
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", spans))
    unknown = sorted(flags - options - FOREIGN_FLAGS - {"--help", "--version"})
    assert not unknown


@each_document
def test_every_command_in_a_document_parses(path: Path) -> None:
    for block in blocks(path.read_text(), "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] in COMMANDS:
                parse_options(COMMANDS[words[0]], words[1:])


@each_document
def test_every_link_of_a_document_leads_somewhere(path: Path) -> None:
    pages = generated_pages()
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        name = (
            str(target.relative_to(ROOT / "docs")) if target.is_relative_to(ROOT / "docs") else ""
        )
        assert target.exists() or name in pages, link
        if anchor and target.exists():
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [
                re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings
            ], link


@each_document
def test_every_document_begins_with_its_title(path: Path) -> None:
    assert path.read_text().startswith("# ")


def test_every_page_that_the_code_names_exists() -> None:
    named = {
        (file, page)
        for file, text in sources().items()
        for page in re.findall(r"(?<![\w/])docs/[\w/-]+\.(?:md|png)", text)
    }
    foreign = {"docs/operators.md", "docs/Changelog.md"}
    assert not [
        (file, page) for file, page in named if page not in foreign and not (ROOT / page).exists()
    ]


def test_the_site_has_a_page_for_each_command() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert set(COMMANDS) == set(
        re.findall(r'^(anyflow-[\w-]+) = "anyflow_deploy\.cli', project, re.MULTILINE)
    )
    pages = generated_pages()
    site = (ROOT / "mkdocs.yml").read_text()
    assert not [page for page in pages if page not in site]
    for command, options in COMMANDS.items():
        page = pages[f"reference/commands/{command}.md"]
        flags = {
            (field.alias or name).replace("_", "-") for name, field in options.model_fields.items()
        }
        assert not [flag for flag in flags if flag not in page.lower()]
        assert "[/]" not in page and "[dim]" not in page


def test_the_site_has_every_public_name() -> None:
    page = generated_pages()["reference/python.md"]
    missing = [
        name for name in anyflow_deploy.__all__ if f"::: anyflow_deploy.{name}\n" not in page
    ]
    assert not missing


def test_every_page_is_in_the_sites_menu() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    assert not [
        path
        for path in (ROOT / "docs").rglob("*.md")
        if str(path.relative_to(ROOT / "docs")) not in site
    ]
