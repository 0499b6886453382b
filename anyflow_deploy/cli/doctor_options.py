"""The flags of `anyflow-doctor`, in a module of their own.

They need pydantic, and the doctor has to answer where pydantic is broken.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from anyflow_deploy.cli.options import JsonFlag, Options

Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda v: v.split(",") if isinstance(v, str) else v)
]


class DoctorOptions(Options):
    """Say what works on this machine, and which backend runs which precision.

    It looks at Python, GPU, runtimes, compilers and headers. Each thing works, does not work (it is
    installed, and broken) or is missing, with what to do about it.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "anyflow-doctor",
        "anyflow-doctor --require onnxruntime:int8",
        "anyflow-doctor --require tensorrt:fp8,aotinductor --provider cuda --json",
    )
    VERDICT: ClassVar[str] = (
        "something that --require names does not run here, or the packages that every command needs"
        " are broken"
    )

    require: Names = Field(
        (), description="backend or backend:precision that has to run, several with commas"
    )
    provider: str | None = Field(
        None,
        pattern="^(cpu|cuda)$",
        description="where --require has to run: cpu or cuda (default: cpu if it can)",
    )
    json_output: JsonFlag = False

    @model_validator(mode="after")
    def _check_provider(self) -> DoctorOptions:
        if self.provider is not None and not self.require:
            raise ValueError(
                "--provider says where --require has to run; give --require, or leave --provider"
                " out."
            )
        return self
