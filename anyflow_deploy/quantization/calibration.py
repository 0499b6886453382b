"""`calibration.json`: the largest inputs of every quantized layer, over any step.

Ranges are measured once (`anyflow-calibrate`, on a GPU if possible) and used wherever the
same weights are exported; the fingerprint of the weights is stored, and a calibration of other
weights is refused. docs/how-to/quantization.md describes the format.

This module imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from anyflow_deploy.bundle.json_records import FrozenRecord, load_record

CALIBRATION = "calibration.json"
CALIBRATION_SCHEMA = 1

_Amax = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class TensorRange(FrozenRecord):
    """The largest absolute values a tensor took.

    Attributes:
        amax: over the whole tensor.
        channels: over each input channel, for SmoothQuant; None where it is not needed (attention).
    """

    amax: _Amax
    channels: list[_Amax] | None = None


class Calibration(FrozenRecord):
    """The whole calibration file.

    Attributes:
        config: `config.json` of the architecture.
        weights: fingerprint of the weights (`checkpoints.weights.compute_fingerprint`).
        prompts, steps, seeds, shift, shapes: settings of the rollouts; shapes are those of the
            latents, (B, F, C, H, W), of one prompt.
        prompts_left_out: given, and not run, since the ranges stood still.
        thorough: every prompt was run, with all rows of its text. (Files that do not say so were.)
        batch: prompts that ran at once.
        chunks: latent frames of a causal model's chunks.
        sweeps: timesteps of further rollouts, which visit times that uniform schedules jump over.
        text: "encoder" when the prompts went through the model's own text encoder, "random" when
            there was none and seeded standard-normal embeddings stood in.
        tools: name -> version.
        tensors: ranges by name: `blocks.0.attn1.to_q.input` is the input of a linear layer;
            `blocks.0.attn1.query`, `.key`, `.value` and `.probabilities` are the operands of the
            two attention products.
    """

    schema_version: int = Field(default=CALIBRATION_SCHEMA, alias="schema")
    config: dict[str, Any]
    weights: str
    prompts: list[str]
    prompts_left_out: list[str] = Field(default_factory=list)
    thorough: bool = True
    batch: int = 1
    chunks: list[int] = Field(default_factory=list)
    steps: list[int]
    seeds: list[int]
    shift: float
    shapes: list[list[int]]
    sweeps: list[list[float]] = Field(default_factory=list)
    text: Literal["encoder", "random"] = "encoder"
    tools: dict[str, str]
    tensors: dict[str, TensorRange]


def load_calibration(path: Path) -> Calibration:
    """Read a `calibration.json`.

    Raises:
        AnyFlowError: not there, not such a file, of another schema, or with ranges that are
            infinite or not numbers.
    """
    return load_record(
        path, Calibration, CALIBRATION_SCHEMA, f"anyflow-calibrate --model … --output {path}"
    )
