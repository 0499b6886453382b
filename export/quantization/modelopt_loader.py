"""The door to ModelOpt, which takes ten seconds to import and need not be installed for anything
but quantizing."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from anyflow_deploy.errors import BackendError


def load_modelopt() -> ModuleType:
    """`export.quantizers`, which stands on ModelOpt.

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
