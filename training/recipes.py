"""Recipes: all settings of a run, as frozen values that derive from each other.

    # STAGE-SIZE[-causal]; STAGE is teacher, flow-map or on-policy:
    get_recipe("on-policy-1.3b-causal")

Numbers are the paper's and the authors' code's where docs/how-to/training.md says so. A field is
also a flag of `python -m anyflow_deploy.train`; `override_recipe` checks it. The recipe is stored
with every checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import PositiveInt, TypeAdapter, ValidationError

from anyflow_deploy.errors import AnyFlowError, suggestion
from anyflow_deploy.models import MODELS, SPATIAL_FACTOR, TEXT_TOKENS, Architecture, Model
from anyflow_deploy.shape_ranges import latent_frames
from anyflow_deploy.training.config import FlowMapConfig, LoRAConfig, OptimizerConfig, RunConfig

STAGES = ("teacher", "flow-map", "on-policy")
SIZES = ("tiny", "shapes", "1.3b", "14b")


@dataclass(frozen=True)
class Recipe:
    """The settings of one run.

    Attributes:
        frames, height, width: of the latents.
        text_tokens: that a prompt is padded to.
    """

    name: str
    stage: Literal["teacher", "flow-map", "on-policy"]
    model: str
    frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    optimizing: OptimizerConfig
    adapting: LoRAConfig = field(default_factory=LoRAConfig)
    flow: FlowMapConfig = field(default_factory=FlowMapConfig)
    running: RunConfig = field(default_factory=RunConfig)
    text_tokens: PositiveInt = TEXT_TOKENS

    @property
    def row(self) -> Model:
        """The model's row of the table."""
        return MODELS[self.model]

    @property
    def architecture(self) -> Architecture:
        """The architecture of the model's row.

        A checkpoint that a run starts from may have another.
        """
        return self.row.architecture

    @property
    def causal(self) -> bool:
        """Whether the model is causal."""
        return self.architecture.causal


GROUPS = ("optimizing", "adapting", "flow", "running")


def recipe_names() -> tuple[str, ...]:
    """Return the names of all recipes."""
    return tuple(
        f"{stage}-{size}{end}" for stage in STAGES for size in SIZES for end in ("", "-causal")
    )


def get_recipe(name: str) -> Recipe:
    """Return the recipe of a name.

    Raises:
        AnyFlowError: an unknown name, with the nearest known one.
    """
    if name not in recipe_names():
        raise AnyFlowError(
            f"unknown recipe {name!r}: known are STAGE-SIZE and STAGE-SIZE-causal, where STAGE is"
            f" one of {', '.join(STAGES)} and SIZE one of"
            f" {', '.join(SIZES)}.{suggestion(name, recipe_names())}"
        )
    stage = next(s for s in STAGES if name.startswith(s))
    size, _, causal = name[len(stage) + 1 :].partition("-")
    row = MODELS[f"far-{size}" if causal else size]
    frames, height, width = row.video
    base = Recipe(
        name=name,
        stage=stage,  # type: ignore[arg-type]  # one of STAGES
        model=row.name,
        frames=latent_frames(frames, 4),
        height=height // SPATIAL_FACTOR,
        width=width // SPATIAL_FACTOR,
        optimizing=_STAGE_OPTIMIZERS[stage](size),
        flow=FlowMapConfig(shift=row.shift),
    )
    if stage == "teacher":
        base = dataclasses.replace(
            base,
            flow=dataclasses.replace(base.flow, text_drop=0.1),
            adapting=dataclasses.replace(base.adapting, lora_times=False),
        )
    if size == "14b":
        base = dataclasses.replace(
            base, running=dataclasses.replace(base.running, save_type="bfloat16")
        )
    if size == "shapes":
        return _shrink_to_shapes(base)
    return _shrink_to_tiny(base) if size == "tiny" else base


def _teacher_optimizer(size: str) -> OptimizerConfig:
    """Return the settings for flow matching; the number of steps is ours."""
    return OptimizerConfig(steps=2000, batch=16 if size == "14b" else 32, learning_rate=5e-5)


def _flow_map_optimizer(size: str) -> OptimizerConfig:
    """Return the settings of the reference's stage 1."""
    large = size == "14b"
    return OptimizerConfig(
        steps=4000 if large else 6000, batch=16 if large else 32, learning_rate=5e-5, ema_start=1000
    )


def _on_policy_optimizer(size: str) -> OptimizerConfig:
    """Return the settings of the reference's stage 2."""
    return dataclasses.replace(
        _flow_map_optimizer(size),
        steps=1000,
        learning_rate=2e-6,
        beta1=0.0,
        beta2=0.999,
        ema=0.99,
        ema_start=0,
    )


_STAGE_OPTIMIZERS = {
    "teacher": _teacher_optimizer,
    "flow-map": _flow_map_optimizer,
    "on-policy": _on_policy_optimizer,
}


def _shrink_to_tiny(base: Recipe) -> Recipe:
    """Return a recipe for a CPU: all weights, float32, minutes."""
    rate = 1e-3 if base.stage != "on-policy" else 2e-5
    return dataclasses.replace(
        base,
        text_tokens=16,
        optimizing=dataclasses.replace(
            base.optimizing,
            steps=200,
            batch=8,
            micro_batch=8,
            learning_rate=rate,
            ema=0.99,
            ema_start=50,
        ),
        adapting=LoRAConfig(lora_rank=0),
        running=dataclasses.replace(
            base.running,
            compute="float32",
            checkpointing=False,
            checkpoint_every=50,
            sample_every=50,
            asynchronous=False,
        ),
    )


def _shrink_to_shapes(base: Recipe) -> Recipe:
    """Return a recipe of the `shapes` models: all weights, float32, on two cores in half an hour.

    The teacher starts from nothing. Guidance is lower than Wan's: captions say all there is.
    """
    optimizers = {
        "teacher": OptimizerConfig(
            steps=4500, batch=32, learning_rate=1e-3, warm_up=100, ema=0.998, ema_start=500
        ),
        "flow-map": OptimizerConfig(
            steps=800, batch=32, learning_rate=5e-4, warm_up=50, ema=0.995, ema_start=100
        ),
        "on-policy": OptimizerConfig(
            steps=150, batch=16, learning_rate=1e-4, beta1=0.0, beta2=0.999, ema=0.98
        ),
    }
    optimizing = optimizers[base.stage]
    return dataclasses.replace(
        base,
        optimizing=dataclasses.replace(
            optimizing,
            micro_batch=optimizing.batch,
            beta2=max(optimizing.beta2, 0.98),
            final_rate=0.05,
        ),
        adapting=LoRAConfig(lora_rank=0),
        flow=dataclasses.replace(
            base.flow, guidance=2.0, real_guidance=1.0, rollout_steps=(1, 2, 4, 8, 16, 32)
        ),
        running=dataclasses.replace(
            base.running,
            compute="float32",
            checkpointing=False,
            asynchronous=False,
            sample_every=1000,
            merge_padding=True,
        ),
    )


def recipe_fields(
    recipe: type[Any] = Recipe,
) -> Iterator[tuple[str, str | None, dataclasses.Field[Any]]]:
    """Yield every field that can be overridden: (name, group, field)."""
    for one in dataclasses.fields(recipe):
        if one.name not in (*GROUPS, "name", "stage", "model"):
            yield one.name, None, one
    for group, kind in (
        ("optimizing", OptimizerConfig),
        ("adapting", LoRAConfig),
        ("flow", FlowMapConfig),
        ("running", RunConfig),
    ):
        for one in dataclasses.fields(kind):
            yield one.name, group, one


def override_recipe(base: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return a recipe with other values.

    Args:
        base: to start from.
        values: by field name; strings are parsed ("5e-5", "1,2,4").

    Raises:
        AnyFlowError: an unknown name, a value that is not allowed, or values that contradict each
            other.
    """
    groups = {name: group for name, group, _ in recipe_fields()}
    content = recipe_to_dict(base)
    for name, value in values.items():
        if name not in groups:
            raise AnyFlowError(f"unknown setting {name!r}.{suggestion(name, groups)}")
        group = groups[name]
        target = content if group is None else content[group]
        is_list = isinstance(target[name], list) and isinstance(value, str)
        target[name] = value.split(",") if is_list else value
    result = recipe_from_dict(content)
    _check_consistency(result)
    return result


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON values."""
    content: dict[str, Any] = TypeAdapter(Recipe).dump_python(recipe, mode="json")
    return content


def recipe_from_dict(content: Mapping[str, Any]) -> Recipe:
    """Return the recipe of JSON values from `recipe_to_dict`.

    Raises:
        AnyFlowError: with the field that is wrong.
    """
    try:
        return TypeAdapter(Recipe).validate_python(dict(content))
    except ValidationError as error:
        problem = error.errors()[0]
        flag = str(
            problem["loc"][-1] if not isinstance(problem["loc"][-1], int) else problem["loc"][-2]
        ).replace("_", "-")
        raise AnyFlowError(f"--{flag} is {problem['input']!r}: {problem['msg'].lower()}.") from None


def _check_consistency(recipe: Recipe) -> None:
    """Refuse values that contradict each other."""
    a = recipe.architecture
    optimizer_config = recipe.optimizing
    if optimizer_config.batch % optimizer_config.micro_batch:
        raise AnyFlowError(
            f"--batch {optimizer_config.batch} is not a multiple of --micro-batch"
            f" {optimizer_config.micro_batch}. Change one."
        )
    compressed_side = (a.compressed_patch_size or a.patch_size)[1]
    if (
        recipe.height % a.patch_size[1]
        or recipe.width % a.patch_size[2]
        or min(recipe.height, recipe.width) < compressed_side
    ):
        raise AnyFlowError(
            f"latents of {recipe.height} x {recipe.width} do not divide into patches of"
            f" {a.patch_size[1]} (and at least {compressed_side}); change --height and --width."
        )
    if recipe.frames > a.rope_max_seq_len:
        raise AnyFlowError(
            f"--frames is {recipe.frames}; the model's rotary table ends at {a.rope_max_seq_len}."
        )
