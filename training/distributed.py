"""The processes of a run: one, or those that torchrun (or accelerate) started, with FSDP2's mesh.

    torchrun --nnodes 4 --nproc-per-node 8 -m anyflow_deploy.train flow-map-14b --shard 8 …

`--shard` is how many processes share one copy of the weights (hybrid sharding: copies across nodes,
pieces within one); all of them by default.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from anyflow_deploy.errors import AnyFlowError


@dataclass(frozen=True)
class DistributedContext:
    """The place of this process among the others.

    Attributes:
        rank, size: of the process group.
        device: of this process.
        mesh: FSDP's, None for one process.
        writers: a group of its own for checkpoints that are written while training continues.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    writers: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes logs and folders."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            dist.barrier()


def init_distributed(shard: int | None = None, device: str | None = None) -> DistributedContext:
    """Join the process group that the environment describes; without one, run as one process.

    Args:
        shard: processes that share one copy of the weights; None for all.
        device: "cpu" or "cuda"; None for CUDA where there is any.

    Raises:
        AnyFlowError: an incomplete environment, a `shard` that does not divide the processes, or no
            group within two minutes.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    variables = [name for name in names if name in os.environ]
    if not variables or os.environ.get("WORLD_SIZE") == "1":
        if shard not in (None, 1):
            raise AnyFlowError(
                f"--shard is {shard} and there is one process. Start more with torchrun, or leave"
                " it out."
            )
        return DistributedContext(0, 1, torch.device(kind))
    if len(variables) < len(names):
        missing = ", ".join(sorted(set(names) - set(variables)))
        raise AnyFlowError(
            f"the environment has {', '.join(variables)} and lacks {missing}. Start with torchrun."
        )
    size = int(os.environ["WORLD_SIZE"])
    local = int(os.environ["LOCAL_RANK"])
    if shard is not None and (shard < 1 or size % shard):
        raise AnyFlowError(f"--shard is {shard}; allowed are divisors of the {size} processes.")
    if kind == "cuda":
        torch.cuda.set_device(local)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=2)
        )
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        raise AnyFlowError(
            f"the process group of {size} could not be formed: {error}. Check MASTER_ADDR and"
            " MASTER_PORT."
        ) from None
    pieces = shard or size
    if pieces == size:
        mesh = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(kind, (size // pieces, pieces), mesh_dim_names=("copy", "shard"))
    process_device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    return DistributedContext(
        dist.get_rank(), size, process_device, mesh, dist.new_group(backend="gloo")
    )


def shutdown_distributed(world: DistributedContext) -> None:
    """End the process group."""
    if world.size > 1:
        dist.destroy_process_group()
