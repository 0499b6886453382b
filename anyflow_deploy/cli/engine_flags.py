"""The flags of every command that runs an engine, each written once.

A field takes one of these as its type: `threads: ThreadsFlag = None`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

KernelSpecialization = Literal["lazy", "eager", "none"]
"""`registry.KERNEL_SPECIALIZATIONS`; which backends take it, `check_kernel_specialization` says."""

BackendFlag = Annotated[str, Field(description="backend of the engine")]
ProviderFlag = Annotated[
    str | None,
    Field(
        description="what the engine runs on: cpu or cuda (default: cpu where the backend has it)"
    ),
]
ThreadsFlag = Annotated[int | None, Field(ge=1, description="CPU threads of the engine")]
EngineFlag = Annotated[
    str | None, Field(description="name or path of a built engine, where the backend has several")
]
KernelSpecializationFlag = Annotated[
    KernelSpecialization | None,
    Field(
        description="tensorrt-rtx: when kernels for one shape are compiled: lazy (in the"
        " background), eager or none (default lazy)"
    ),
]
PipelineFlag = Annotated[
    str | None,
    Field(
        description="pipeline folder or Hub id with text encoder and VAE, if not the bundle's own"
    ),
]
