"""Imports ModelOpt where it is needed.

The import takes ten seconds, and only quantizing needs the package.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

from anyflow_deploy.errors import BackendError


def load_modelopt() -> ModuleType:
    """Import `observers`, which needs ModelOpt.

    Raises:
        BackendError: it is not installed.
    """
    if importlib.util.find_spec("modelopt") is None:
        raise BackendError(
            "quantizing needs NVIDIA ModelOpt, which is not installed. Run: pip install"
            " 'anyflow-deploy[quantize]'"
        )
    from anyflow_deploy.export.quantization import observers

    return observers
