"""Files that belong to one kind of GPU, in the user's cache folder: timing caches, and the kernels
of TensorRT for RTX. Each can be deleted at any time, and is made again.
"""

from __future__ import annotations

import os
import re
from pathlib import Path


def user_cache_file(backend: str, device: str, name: str) -> Path:
    """Return where a file goes: below $XDG_CACHE_HOME, or ~/.cache.

    Args:
        backend: its folder.
        device: name of the GPU.
        name: what follows the GPU's name, with the ending.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return root / "anyflow_deploy" / backend / f"{slug}-{name}"
