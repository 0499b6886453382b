"""The settings of a recipe, in four groups.

A field's type is its check; `recipes` has the values of each recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

UnitFloat = Annotated[float, Field(ge=0, le=1)]
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, the batch, and the number of steps.

    Attributes:
        steps: optimizer steps of the whole run.
        batch: samples of one optimizer step, over all processes.
        micro_batch: samples that one process holds at once; gradients are accumulated up to
            `batch`.
        clip: largest norm of the gradient.
        warm_up: steps in which the learning rate rises from zero.
        final_rate: learning rate of the last step as a share of the highest; a cosine leads there.
        ema, ema_start: decay of the moving average of the trained weights, and the step it starts
            from.
    """

    steps: PositiveInt
    batch: PositiveInt
    learning_rate: PositiveFloat
    beta1: UnitFloat = 0.9
    beta2: UnitFloat = 0.95
    weight_decay: NonNegativeFloat = 0.0
    micro_batch: PositiveInt = 1
    clip: PositiveFloat = 1.0
    warm_up: NonNegativeInt = 0
    final_rate: UnitFloat = 1.0
    ema: UnitFloat = 0.999
    ema_start: NonNegativeInt = 0


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA, always without dropout, which would corrupt the finite difference.

    Attributes:
        lora_rank: 0 trains all weights instead.
        lora_alpha: the update is scaled by alpha / rank; None makes alpha follow the rank. Saved
            adapters have the scale in their weights, so every loader applies them correctly.
        lora_times: adapt both time embedders, too.
    """

    lora_rank: NonNegativeInt = 256
    lora_alpha: PositiveInt | None = None
    lora_times: bool = True


@dataclass(frozen=True)
class FlowMapConfig:
    """The constants of the losses.

    Attributes:
        shift: of all schedules.
        guidance: guidance scale g that is fused into the flow map.
        derivative, epsilon, derivative_type: of du/dt, see `losses.DerivativeConfig`.
        text_drop: fraction of samples that are trained without their text (teacher).
        long_context: fraction of steps in which a causal model sees compressed chunks.
        rollout_steps: numbers of steps that roll-outs simulate.
        real_guidance: guidance scale g of the real score.
        flow_map_weight: weight of stage 1's loss while training on policy.
    """

    shift: PositiveFloat = 5.0
    guidance: PositiveFloat = 3.0
    derivative: Literal["central", "jvp"] = "central"
    epsilon: PositiveFloat = 5.0
    derivative_type: DType = "float32"
    text_drop: UnitFloat = 0.0
    long_context: UnitFloat = 0.5
    rollout_steps: tuple[PositiveInt, ...] = (2, 4, 8, 16, 50)
    real_guidance: NonNegativeFloat = 3.0
    flow_map_weight: NonNegativeFloat = 1.0


@dataclass(frozen=True)
class RunConfig:
    """How a run is computed, and what it saves.

    Attributes:
        seed: of all random numbers.
        compute: type of the large products.
        checkpointing: recompute each layer in the backward pass instead of keeping its tensors.
        offload: keep the inputs of recomputed layers in main memory, not on the GPU.
        compile: torch.compile each layer.
        checkpoint_every, keep: steps between checkpoints, and how many are kept.
        asynchronous: write checkpoints while training continues.
        sample_every, sample_steps: steps between sample grids (0: none), and the numbers of steps
            in their columns.
        spike: stop when the loss is more than this many times its running mean (0: never). A loss
            that is not finite always stops the run.
        save_type: type of the finished weights.
        merge_padding: attend to the zeros behind all prompts of a batch once; the same result, and
            faster where prompts are much shorter than `text_tokens`.
    """

    seed: NonNegativeInt = 0
    compute: DType = "bfloat16"
    checkpointing: bool = True
    offload: bool = False
    compile: bool = False
    checkpoint_every: PositiveInt = 250
    keep: PositiveInt = 3
    asynchronous: bool = True
    sample_every: NonNegativeInt = 250
    sample_steps: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16)
    spike: NonNegativeFloat = 100.0
    save_type: DType = "float32"
    merge_padding: bool = False
