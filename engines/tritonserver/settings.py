"""How a served model runs and what it lets anybody ask for: the `parameters` of config.pbtxt,
typed.

They are written by `anyflow-triton` and may be changed in the file; the model reads them whenever
the server loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from anyflow_deploy.errors import AnyFlowError, suggestion
from anyflow_deploy.serving.limits import Limits

PARTS = {"text": ("tokenizer", "text_encoder"), "vae": ("vae",)}
"""What may be served beside the engine, and the folders of a pipeline that it needs."""


class Settings(BaseModel):
    """See the module.

    Attributes:
        bundle: folder, seen from the version's folder.
        pipeline: folder with tokenizer, text encoder and VAE, seen from the version's folder; None
            where neither is served.
        text: prompts are taken; else embeddings only.
        vae: frames and mp4 are given; else latents only.
        backend, engine, threads: see `load_engine`; whether it runs on a CPU or a GPU,
            `instance_group` says.
        max_streams: videos that an instance makes at once.
        max_waiting: videos that may wait for a place; one more is refused.
        cache_bytes: of all streams' keys and values together; None for what `max_streams` videos of
            default size take.
        max_steps, max_frames, max_pixels, max_deadline_ms, max_prompt: of one request.
        grace_seconds: that running videos have when the model is unloaded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str = "bundle"
    pipeline: str | None = None
    text: bool = True
    vae: bool = True
    backend: str = "onnxruntime"
    engine: str | None = None
    threads: int | None = Field(None, ge=1)
    max_streams: int = Field(8, ge=1, le=1000)
    max_waiting: int = Field(32, ge=0, le=10000)
    cache_bytes: int | None = Field(None, ge=1)
    max_steps: int = Field(50, ge=1, le=1000)
    max_frames: int = Field(ge=1)
    max_pixels: int = Field(ge=256)
    max_deadline_ms: float = Field(600_000.0, gt=0, allow_inf_nan=False)
    max_prompt: int = Field(4000, ge=1)
    grace_seconds: float = Field(20.0, ge=0, allow_inf_nan=False)

    @property
    def folders(self) -> list[str]:
        """Of the pipeline, that are served."""
        return [
            folder for part, folders in PARTS.items() if getattr(self, part) for folder in folders
        ]

    @property
    def limits(self) -> Limits:
        """Of one request, as every server has them."""
        return Limits(
            frames=self.max_frames,
            pixels=self.max_pixels,
            steps=self.max_steps,
            deadline_seconds=self.max_deadline_ms / 1000,
            prompt_characters=self.max_prompt,
        )

    def as_parameters(self) -> dict[str, str]:
        """As config.pbtxt holds them: text; what is None is left out."""
        return {name: str(value) for name, value in self.model_dump().items() if value is not None}


def settings_from(parameters: Mapping[str, Any]) -> Settings:
    """Read them back.

    Args:
        parameters: of the model's configuration, name -> {"string_value": text}.

    Raises:
        AnyFlowError: naming the parameter, what was given and what is allowed.
    """
    given = {
        name: value["string_value"]
        for name, value in parameters.items()
        if name not in SERVER_PARAMETERS
    }
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "?"
        known = list(Settings.model_fields)
        if first["type"] == "extra_forbidden":
            raise AnyFlowError(
                f"config.pbtxt has an unknown parameter {name!r}; allowed are"
                f" {', '.join(known)}.{suggestion(name, known)}"
            ) from None
        if first["type"] == "missing":
            raise AnyFlowError(
                f"config.pbtxt lacks the parameter {name!r}. Write it again with anyflow-triton."
            ) from None
        raise AnyFlowError(
            f"config.pbtxt has {name} = {first['input']!r}: {first['msg'].lower()}."
        ) from None


SERVER_PARAMETERS = ("EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS")
"""Parameters that are the Python backend's own."""
