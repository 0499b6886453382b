"""A bundle's weights as torch tensors on one device, one copy, shared by all graphs of an engine.

Compiled packages hold no weights: they are read from the bundle's own `weights.safetensors`, with
plain reads, one tensor at a time. `release` gives the memory back even where a package still refers
to a tensor: AOTInductor's runtime keeps references to the tensors it was given, and never drops
them.
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
    """A bundle's weights by name, as torch tensors on one device.

    Args:
        torch: the module.
        bundle: an opened bundle.
        device: torch's name of it.
        names: of the weights to load; None for all.

    Raises:
        BackendError: a name that the bundle lacks, or no memory.
    """

    def __init__(
        self, torch: Any, bundle: Bundle, device: str, names: Collection[str] | None = None
    ) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._finalizer: weakref.finalize[[dict[str, Any]], TorchWeights] | None = None
        with safe_open(str(bundle.file(WEIGHTS)), "pt") as file:
            bundle_names = set(file.keys())
            load_names = sorted(bundle_names if names is None else names)
            if missing := [name for name in load_names if name not in bundle_names]:
                raise BackendError(
                    f"{bundle.path} has no weight {missing[0]!r}, which the engine reads. Build it"
                    " again with anyflow-build."
                )
            try:
                # A copy, so that the file's own pages are released after each tensor
                for name in load_names:
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
        """Return the tensors of these names."""
        return {name: self._tensors[name] for name in names}

    def share(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return tensors for AOTInductor's runtime.

        From then on they are released with this object at the latest.
        """
        if self._finalizer is None:
            self._finalizer = weakref.finalize(self, _free_storage, self._tensors)
            self._finalizer.atexit = False
        return self.select(names)

    def release(self) -> None:
        """Give the memory back, even where something else still refers to the tensors."""
        _free_storage(self._tensors)


def _free_storage(tensors: dict[str, Any]) -> None:
    for tensor in tensors.values():
        tensor.untyped_storage().resize_(0)
    tensors.clear()
