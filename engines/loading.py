"""Find the backend that runs a bundle.

`BACKENDS` is the whole registry: a name, and the module and function that make the engine. A module is imported only
when its backend is asked for, so a device needs the runtime of the one it uses and no other.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from anyflow_deploy.bundle import Bundle, load_bundle
from anyflow_deploy.engines.engine import BundleEngine
from anyflow_deploy.errors import AnyFlowError, suggestion

BACKENDS = {"onnxruntime": "anyflow_deploy.engines.onnxruntime_engine:OnnxRuntimeEngine"}


def load_engine(
    bundle: Bundle | str | Path, backend: str = "onnxruntime", provider: str = "cpu", threads: int | None = None
) -> BundleEngine:
    """Make an engine from a bundle.

    Args:
        bundle: from `load_bundle`, or the folder (all hashes are then verified).
        backend: a name in `BACKENDS`.
        provider: what the backend runs on, "cpu" or "cuda"; there is no fallback from one to the other.
        threads: CPU threads; None for as many as there are physical cores.

    Raises:
        BackendError: the backend or provider is not installed, or cannot run the bundle's precision.
    """
    if backend not in BACKENDS:
        raise AnyFlowError(f"unknown backend {backend!r}: this version has {', '.join(BACKENDS)}.{suggestion(backend, BACKENDS)}")
    module, name = BACKENDS[backend].split(":")
    make = getattr(importlib.import_module(module), name)
    opened = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    return cast(BundleEngine, make(opened, provider=provider, threads=threads))
