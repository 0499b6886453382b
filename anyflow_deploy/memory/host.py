"""How much memory this machine has left."""

from __future__ import annotations

from pathlib import Path


def available_host_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that a new program can take without swapping; None where Linux does not say.

    Args:
        root: where /proc lies.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None
