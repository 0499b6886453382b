"""Makes type stubs of TensorRT, or TensorRT for RTX, from NVIDIA's Python bindings alone.

    python tools/tensorrt_stubs.py            # every release in RELEASES, into .cache/tensorrt

TensorRT cannot be installed everywhere, but its Python bindings are a small wheel, and they contain
every class, signature and enum of their release. Their import needs only a few C functions of the
missing libraries, which shared objects with empty functions provide. pybind11-stubgen then writes
stubs, and `clean_stubs` turns them into valid Python. The result is a reference of names and types,
for mypy and for the tests' fake TensorRT; nothing can be built or run with it. The module is called
`tensorrt` in every release, since one source serves both libraries.

The stubs are not checked in, since they derive from NVIDIA's wheel; they are made once and kept in
.cache. That takes two seconds a release, and needs the package index, gcc and pybind11-stubgen.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

RELEASES = {
    "10.3": ("tensorrt-cu12-bindings", "10.3.0"),
    "10.16": ("tensorrt-cu12-bindings", "10.16.1.11"),
    "11.4": ("tensorrt-cu13-bindings", "11.4.0.106"),
    "rtx-1.7": ("tensorrt-rtx-cu12-bindings", "1.7.1.116"),
}
"""TensorRT: JetPack 6's, the last 10, and the newest. TensorRT for RTX: the newest."""

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "tensorrt"

_EXTENSIONS = {
    "tensorrt-cu": "tensorrt_bindings.tensorrt",
    "tensorrt-rtx": "tensorrt_rtx_bindings.tensorrt_rtx",
}
"""Module of the extension, by how the wheel's name begins."""

_LIBRARIES = (
    "libnvinfer",
    "libnvinfer_plugin",
    "libnvonnxparser",
    "libtensorrt_rtx",
    "libtensorrt_onnxparser_rtx",
)
"""What the extensions are linked with; each asks for some of them."""

_SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


_failures: dict[str, StubsError] = {}
_LAST_PYTHON = {"10.3": (3, 12)}
"""The last Python that a release has wheels for, where there are newer ones."""


class StubsError(Exception):
    """The stubs could not be made; the message says what failed, and what it needs."""


class NotOnThisMachineError(StubsError):
    """This machine has no compiler, or a Python that the release has no wheel for."""


def stubs(release: str) -> Path:
    """Return a folder for MYPYPATH with `tensorrt/__init__.pyi` of a release in `RELEASES`.

    The stubs are made where they are missing.

    Raises:
        NotOnThisMachineError: no wheel for this Python, or no gcc.
        StubsError: no package index, or no pybind11-stubgen.
    """
    package, version = RELEASES[release]
    if sys.version_info[:2] > _LAST_PYTHON.get(release, (3, 99)):
        raise NotOnThisMachineError(
            f"TensorRT {release} has no bindings for Python"
            f" {sys.version_info[0]}.{sys.version_info[1]}."
        )
    digest = hashlib.sha256(Path(__file__).read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = CACHE / f"{version}-{digest}"
    target = folder / "tensorrt" / "__init__.pyi"
    if not target.exists():
        if release in _failures:
            raise _failures[release]
        try:
            source = clean_stubs(_generate_stubs(package, version))
        except StubsError as error:
            _failures[release] = error  # many tests ask for the same release
            raise
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        partial.write_text(source)
        partial.replace(target)  # two test workers may get here at once
    return folder


def _generate_stubs(package: str, version: str) -> str:
    """Return the stubs of a release, as pybind11-stubgen writes them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        download = [
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            name,
            f"{package}=={version}",
        ]
        _run(
            [sys.executable, "-m", *download],
            f"the package index, and a wheel of {package} {version} for this Python",
        )
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
        _satisfy(folder, version.split(".")[0])
        environment = {**os.environ, "LD_LIBRARY_PATH": name, "PYTHONPATH": name}
        extension = next(ext for start, ext in _EXTENSIONS.items() if package.startswith(start))
        stubgen = [
            "pybind11_stubgen",
            extension,
            "-o",
            str(folder / "stubs"),
            "--ignore-all-errors",
        ]
        _run(
            [sys.executable, "-m", *stubgen],
            "pybind11-stubgen (pip install pybind11-stubgen)",
            environment,
        )
        return (folder / "stubs" / f"{extension.replace('.', '/')}.pyi").read_text()


def _satisfy(folder: Path, major: str) -> None:
    """Build the shared objects that the bindings look for."""
    if shutil.which("gcc") is None:
        raise NotOnThisMachineError("TensorRT's stubs need gcc, which is not installed.")
    (folder / "none.c").write_text(
        "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in _SYMBOLS)
    )
    for library in _LIBRARIES:
        soname = f"{library}.so.{major}"
        arguments = [
            "-shared",
            "-fPIC",
            f"-Wl,-soname,{soname}",
            "-o",
            str(folder / soname),
            str(folder / "none.c"),
        ]
        _run(["gcc", *arguments], "gcc")


def _run(command: list[str], needs: str, environment: dict[str, str] | None = None) -> None:
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        last = (process.stderr or process.stdout).strip().splitlines()[-1:]
        raise StubsError(
            f"TensorRT's stubs could not be made. This step needs {needs}: {' '.join(last)}"
        )


def clean_stubs(source: str) -> str:
    """Turn pybind11-stubgen's output into Python that mypy reads.

    Parameters called like keywords are renamed; after one default all have one; docstrings go;
    `bool`, which the module redefines as a `DataType`, becomes the builtin again; types that were
    not found become Any.

    Raises:
        StubsError: something else that is not Python.
    """
    text = re.sub(r"(?<=[(, ])in: ", "in_: ", source)
    for extension in _EXTENSIONS.values():
        text = text.replace(f"{extension}.", "")
    text = "\n".join(
        _add_defaults(line) if line.lstrip().startswith("def ") else line
        for line in text.split("\n")
    )
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise StubsError(
            f"pybind11-stubgen wrote a line that is not Python: {(error.text or '').strip()[:160]}"
        ) from None
    module = _Cleaner().visit(tree)
    module.body.insert(1, ast.parse("import builtins").body[0])
    module.body += ast.parse("__version__: str").body  # the package sets it, not the extension
    return ast.unparse(ast.fix_missing_locations(module)) + "\n"


def _add_defaults(line: str) -> str:
    """Rewrite `def f(a = 1, b)` as `def f(a = 1, b = ...)`."""
    head, _, rest = line.partition("(")
    parameters, close, tail = rest.rpartition(")")
    parts, depth = [""], 0
    for character in parameters:
        depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(character, 0)
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    first = next((i for i, part in enumerate(parts) if " = " in part), len(parts))
    parts[first:] = [part.split(" = ")[0] + " = ..." for part in parts[first:]]
    return f"{head}({','.join(parts)}{close}{tail}"


class _Cleaner(ast.NodeTransformer):
    """Applies the rules of `clean_stubs` to the syntax tree."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.body = [ast.Expr(ast.Constant(...))]
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            argument.annotation = _annotation(argument.annotation)
        node.returns = _annotation(node.returns)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        body = [self.visit(item) for item in node.body if not _is_text(item)]
        node.body = body or [ast.Expr(ast.Constant(...))]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = _annotation(node.annotation) or node.annotation
        node.value = None if node.simple and ast.unparse(node.target) != "__all__" else node.value
        return node

    def visit_Module(self, node: ast.Module) -> ast.Module:
        node.body = [self.visit(item) for item in node.body if not _is_text(item)]
        return node


def _is_text(item: ast.AST) -> bool:
    return (
        isinstance(item, ast.Expr)
        and isinstance(item.value, ast.Constant)
        and isinstance(item.value.value, str)
    )


_BUILTIN = {"bool": "builtins.bool", "capsule": "typing.Any"}


def _annotation(node: ast.expr | None) -> ast.expr | None:
    if node is None:
        return None
    text = re.sub(
        r"(?<![\w.])(bool|capsule)(?![\w.])", lambda match: _BUILTIN[match[1]], ast.unparse(node)
    )
    text = re.sub(r"\.\.\.(?!\])", "typing.Any", text) if text != "..." else "typing.Any"
    return ast.parse(text, mode="eval").body


if __name__ == "__main__":
    for name in RELEASES:
        print(stubs(name))  # noqa: T201
