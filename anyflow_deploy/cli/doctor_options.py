"""The flags of `anyflow-doctor`, apart from it: they need pydantic, and it has to answer where that
is broken."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from anyflow_deploy.cli.options import Options

Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda v: v.split(",") if isinstance(v, str) else v)
]


class DoctorOptions(Options):
    """Say what works on this machine: Python, GPU, runtimes, compilers, headers, and which backend
    runs which precision.

    Each thing works, does not work (it is there, and broken) or is missing, with what to do about
    it. The exit status is 0, unless something that --require names does not run."""

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "anyflow-doctor",
        "anyflow-doctor --require onnxruntime:int8",
        "anyflow-doctor --require tensorrt:fp8,aotinductor --provider cuda --json",
    )

    require: Names = Field(
        (), description="backend or backend:precision that has to run, several with commas"
    )
    provider: str | None = Field(
        None,
        pattern="^(cpu|cuda)$",
        description="of --require: cpu or cuda (default: cpu if it has it)",
    )
    json_output: bool = Field(False, alias="json", description="print everything as JSON")

    @model_validator(mode="after")
    def _provider_of_something(self) -> DoctorOptions:
        if self.provider is not None and not self.require:
            raise ValueError(
                "--provider says where --require has to run; give --require, or leave --provider"
                " out."
            )
        return self
