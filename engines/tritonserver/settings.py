"""How a served model runs, and the limits of its requests: the `parameters` of config.pbtxt.

They are written by `anyflow-triton` and may be changed in the file; the model reads them whenever
the server loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from anyflow_deploy.errors import AnyFlowError, suggestion
from anyflow_deploy.serving.limits import Limits

PARTS = {"text": ("tokenizer", "text_encoder"), "vae": ("vae",)}
"""Parts that may be served beside the engine, each with its folders in a pipeline."""


class Settings(BaseModel):
    """The typed `parameters` of config.pbtxt.

    Attributes:
        bundle: its folder, relative to the version's folder.
        pipeline: folder with tokenizer, text encoder and VAE, relative to the version's folder;
            None where neither is served.
        text: serve the text encoder, so that requests may send prompts; else embeddings only.
        vae: serve the VAE, so that requests may ask for frames and mp4; else latents only.
        backend, engine, threads, kernel_specialization: see `load_engine`. `instance_group` in
            config.pbtxt decides between CPU and GPU.
        max_streams: videos that an instance generates at once.
        max_waiting: videos that may wait; further ones are refused.
        cache_bytes: the most bytes of all streams' keys and values together; None for those of
            `max_streams` videos of default size.
        max_steps, max_frames, max_pixels, max_deadline_ms, max_prompt: limits of one request.
        grace_seconds: time that running videos have to finish when the model is unloaded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle: str = "bundle"
    pipeline: str | None = None
    text: bool = True
    vae: bool = True
    backend: str = "onnxruntime"
    engine: str | None = None
    threads: int | None = Field(None, ge=1)
    kernel_specialization: Literal["lazy", "eager", "none"] | None = None
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
        """The folders of the pipeline that are served."""
        return [
            folder for part, folders in PARTS.items() if getattr(self, part) for folder in folders
        ]

    @property
    def limits(self) -> Limits:
        """The limits of one request, as every server has them."""
        return Limits(
            frames=self.max_frames,
            pixels=self.max_pixels,
            steps=self.max_steps,
            deadline_seconds=self.max_deadline_ms / 1000,
            prompt_characters=self.max_prompt,
        )

    def as_parameters(self) -> dict[str, str]:
        """Return the parameters of config.pbtxt, as text; fields that are None are left out."""
        return {name: str(value) for name, value in self.model_dump().items() if value is not None}


def settings_from_parameters(parameters: Mapping[str, Any]) -> Settings:
    """Read the settings from the parameters of config.pbtxt.

    Args:
        parameters: of the model's configuration, name -> {"string_value": text}.

    Raises:
        AnyFlowError: naming the parameter, what was given and what is allowed.
    """
    values = {
        name: value["string_value"]
        for name, value in parameters.items()
        if name not in SERVER_PARAMETERS
    }
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "?"
        field_names = list(Settings.model_fields)
        if first["type"] == "extra_forbidden":
            raise AnyFlowError(
                f"config.pbtxt has an unknown parameter {name!r}; allowed are"
                f" {', '.join(field_names)}.{suggestion(name, field_names)}"
            ) from None
        if first["type"] == "missing":
            raise AnyFlowError(
                f"config.pbtxt lacks the parameter {name!r}. Write it again with anyflow-triton."
            ) from None
        raise AnyFlowError(
            f"config.pbtxt has {name} = {first['input']!r}: {first['msg'].lower()}."
        ) from None


SERVER_PARAMETERS = ("EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS")
"""Parameters that Triton's Python backend reads itself."""
