"""Fetches NVIDIA's headers of TensorRT and CUDA, to test the C++ library without either.

    python tools/tensorrt_headers.py 10.16     # into .cache/tensorrt-headers; or 10.3, or 11.1
    python tools/tensorrt_headers.py 10.16 --from URL # a mirror of github.com/NVIDIA/TensorRT

TensorRT's headers come from its open-source repository (Apache-2.0), CUDA's from NVIDIA's wheels of
its runtime. Neither is checked in. test_cpp_tensorrt.py uses the newest release that is there;
where none is, it is skipped and names this file.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

RELEASES = {
    "10.3": ("v10.3.0", ("nvidia-cuda-runtime-cu12==12.9.79", "nvidia-cuda-nvcc-cu12==12.9.86")),
    "10.16": ("v10.16", ("nvidia-cuda-runtime-cu12==12.9.79", "nvidia-cuda-nvcc-cu12==12.9.86")),
    "11.1": ("v11.1", ("nvidia-cuda-runtime==13.5.37", "nvidia-cuda-crt==13.5.37")),
}
"""By release of TensorRT: the tag, and the wheels with CUDA's headers."""

REPOSITORY = "https://github.com/NVIDIA/TensorRT"
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "tensorrt-headers"


def cached_header_folders() -> list[Path]:
    """Return the folders of the newest release in the cache, TensorRT's first.

    The list is empty where there is none.
    """
    releases = [release for release in RELEASES if (CACHE / release).is_dir()]
    return [CACHE / releases[-1] / part for part in ("tensorrt", "cuda")] if releases else []


def fetch_headers(release: str, repository: str = REPOSITORY) -> Path:
    """Fetch a release's headers into the cache, and return their folder.

    Raises:
        subprocess.CalledProcessError: git or pip failed; they have said why.
    """
    target = CACHE / release
    if target.is_dir():
        return target
    tag, wheels = RELEASES[release]
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
            f"--branch={tag}",
        ]
        subprocess.run([*clone, repository, str(source)], check=True)
        subprocess.run(["git", "-C", str(source), "sparse-checkout", "set", "include"], check=True)
        shutil.copytree(source / "include", partial / "tensorrt")
        download = [
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            name,
        ]
        subprocess.run([sys.executable, "-m", *download, *wheels], check=True)
        for wheel in Path(name).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(Path(name) / "wheels")
        for include in sorted((Path(name) / "wheels" / "nvidia").glob("*/include")):
            shutil.copytree(include, partial / "cuda", dirs_exist_ok=True)
        partial.rename(target)
    return target


def main() -> None:
    """Fetch the release that the command line names."""
    parser = argparse.ArgumentParser(
        description="Headers for tests/integration/test_cpp_tensorrt.py."
    )
    parser.add_argument("release", choices=list(RELEASES))
    parser.add_argument("--from", dest="repository", default=REPOSITORY)
    options = parser.parse_args()
    sys.stdout.write(f"{fetch_headers(options.release, options.repository)}\n")


if __name__ == "__main__":
    main()
