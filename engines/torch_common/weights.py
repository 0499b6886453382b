"""A bundle's weights as torch tensors on one device, one copy, shared by all graphs of an engine.

Compiled packages hold no weights: they are read from the bundle's own `weights.safetensors`, with
plain reads, one tensor at a time. `release` gives the memory back even where a package still refers
to a tensor: AOTInductor's runtime keeps a reference of its own to what it was lent, and never lets
go of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.bundle.manifest import WEIGHTS
from anyflow_deploy.errors import BackendError

if TYPE_CHECKING:
    from torch import Tensor


class TorchWeights:
    """Weights by name.

    Args:
        torch: the module.
        bundle: an opened bundle.
        device: torch's name of it.
        names: which; None for all.

    Raises:
        BackendError: a name that the bundle lacks, or no memory.
    """

    def __init__(
        self, torch: Any, bundle: Bundle, device: str, names: Collection[str] | None = None
    ) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._end: weakref.finalize[[dict[str, Any]], TorchWeights] | None = None
        with safe_open(str(bundle.file(WEIGHTS)), "pt") as file:
            stored = set(file.keys())
            requested = sorted(stored if names is None else names)
            if missing := [name for name in requested if name not in stored]:
                raise BackendError(
                    f"{bundle.path} has no weight {missing[0]!r}, which the engine wants. Build it"
                    " again with anyflow-build."
                )
            try:
                for (
                    name
                ) in requested:  # a copy: the file's own pages are let go of with each tensor
                    self._tensors[name] = file.get_tensor(name).to(device, copy=True)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                self.release()
                reason = str(error).splitlines()[0]
                raise BackendError(
                    f"the weights of {bundle.path} do not fit on {device}: {reason} See"
                    " anyflow-fit."
                ) from None

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def select(self, names: Collection[str]) -> dict[str, Tensor]:
        """Those of a graph."""
        return {name: self._tensors[name] for name in names}

    def share(self, names: Collection[str]) -> dict[str, Tensor]:
        """Those of a graph, for AOTInductor's runtime: from now on they are released with this
        object at the latest."""
        if self._end is None:
            self._end = weakref.finalize(self, _free_storage, self._tensors)
            self._end.atexit = False
        return self.select(names)

    def release(self) -> None:
        """Give the memory back, whoever still holds the tensors."""
        _free_storage(self._tensors)


def _free_storage(tensors: dict[str, Any]) -> None:
    for tensor in tensors.values():
        tensor.untyped_storage().resize_(0)
    tensors.clear()
