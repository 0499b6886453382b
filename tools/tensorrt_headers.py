"""Fetches NVIDIA's headers of TensorRT and CUDA, to test the C++ library without either.

    python tools/tensorrt_headers.py 10.16  # into .cache/tensorrt-headers; or 10.3, 11.1, rtx-1.6
    python tools/tensorrt_headers.py 10.16 --from URL  # a mirror of the repository it comes from

TensorRT's headers come from its open-source repository (Apache-2.0), CUDA's headers and its runtime
library from NVIDIA's wheels. The headers of TensorRT for RTX are in NVIDIA's SDK, which has to be
downloaded by hand; NVIDIA's repository has none. The same files, also Apache-2.0, lie in the one of
trtx-rs, Rust bindings to it, and come from there. None are checked in.

test_cpp_tensorrt.py uses TensorRT's newest release that is there, and test_cpp_tensorrt_rtx.py
those of RTX; where none is, they are skipped and name this file.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CUDA_12 = ("nvidia-cuda-runtime-cu12==12.9.79", "nvidia-cuda-nvcc-cu12==12.9.86")
CUDA_13 = ("nvidia-cuda-runtime==13.5.37", "nvidia-cuda-crt==13.5.37")


@dataclass(frozen=True)
class HeaderRelease:
    """Where a release's headers are.

    Attributes:
        tag: of the repository.
        cuda: the wheels with CUDA's headers and its runtime library.
        repository: its address.
        folder: in the repository.
    """

    tag: str
    cuda: tuple[str, ...]
    repository: str = "https://github.com/NVIDIA/TensorRT"
    folder: str = "include"


RELEASES = {
    "rtx-1.6": HeaderRelease(
        "v0.8.0+rtx1.6",
        CUDA_12,
        "https://github.com/rustnn/trtx-rs",
        "trtx-sys/TensorRT-Headers/TRT-RTX-1.6",
    ),
    "10.3": HeaderRelease("v10.3.0", CUDA_12),
    "10.16": HeaderRelease("v10.16", CUDA_12),
    "11.1": HeaderRelease("v11.1", CUDA_13),
}
"""By TensorRT's version, ascending; RTX's, which are another library's, in front."""

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "tensorrt-headers"


def cached_header_folders(*releases: str) -> list[Path]:
    """Return the folders of the first of these releases in the cache, TensorRT's first.

    The list is empty where there is none. Where no release is named, TensorRT's own are looked for,
    the newest first.
    """
    wanted = releases or ("11.1", "10.16", "10.3")
    there = [release for release in wanted if (CACHE / release).is_dir()]
    return [CACHE / there[0] / part for part in ("tensorrt", "cuda")] if there else []


def fetch_headers(release: str, repository: str | None = None) -> Path:
    """Fetch a release's headers, and CUDA's with its runtime library; returns their folder.

    Args:
        release: one of `RELEASES`.
        repository: a mirror of the release's own.

    Raises:
        subprocess.CalledProcessError: git or pip failed; they have said why.
    """
    target = CACHE / release
    if target.is_dir():
        return target
    origin = RELEASES[release]
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        source = Path(name) / "source"
        partial = Path(name) / "headers"
        clone = [
            "git",
            "clone",
            "--quiet",
            "--depth=1",
            "--filter=blob:none",
            "--sparse",
            f"--branch={origin.tag}",
        ]
        subprocess.run([*clone, repository or origin.repository, str(source)], check=True)
        sparse = ["git", "-C", str(source), "sparse-checkout", "set", origin.folder]
        subprocess.run(sparse, check=True)
        shutil.copytree(source / origin.folder, partial / "tensorrt")
        download = [
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            name,
        ]
        subprocess.run([sys.executable, "-m", *download, *origin.cuda], check=True)
        for wheel in Path(name).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(Path(name) / "wheels")
        for include in sorted((Path(name) / "wheels" / "nvidia").glob("*/include")):
            shutil.copytree(include, partial / "cuda", dirs_exist_ok=True)
        for library in (Path(name) / "wheels" / "nvidia").glob("*/lib/libcudart.so.*"):
            (partial / "lib").mkdir(exist_ok=True)
            shutil.copy(library, partial / "lib")
        partial.rename(target)
    return target


def main() -> None:
    """Fetch the release that the command line names."""
    parser = argparse.ArgumentParser(
        description="Headers for tests/integration/test_cpp_tensorrt.py."
    )
    parser.add_argument("release", choices=list(RELEASES))
    parser.add_argument("--from", dest="repository")
    options = parser.parse_args()
    sys.stdout.write(f"{fetch_headers(options.release, options.repository)}\n")


if __name__ == "__main__":
    main()
