"""Files of the kernel under /proc and /sys, which are missing on some machines."""

from __future__ import annotations

from pathlib import Path


def kernel_text(path: Path) -> str:
    """Return the text of a file without the space around it; empty where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
