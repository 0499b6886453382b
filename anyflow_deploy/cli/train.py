"""`python -m anyflow_deploy.train`: train an AnyFlow checkpoint from a Wan2.1 checkpoint."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, create_model

from anyflow_deploy.cli.json_output import print_json
from anyflow_deploy.cli.options import Options, run

PROGRAM = "python -m anyflow_deploy.train"


class TrainOptions(Options):
    """Train one stage of AnyFlow: teacher, flow-map or on-policy.

    RECIPE is STAGE-SIZE or STAGE-SIZE-causal, SIZE one of tiny, 1.3b, 14b. --show prints all its
    settings; each of them is also a flag (--learning-rate 1e-5, --sample-steps 1,4). The same
    command resumes a run that was stopped. Several processes: torchrun --nproc-per-node 8 -m
    anyflow_deploy.train RECIPE …
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("recipe",)
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        f"{PROGRAM} flow-map-tiny --output runs/tiny",
        f"{PROGRAM} on-policy-1.3b-causal --show",
        (
            f"{PROGRAM} flow-map-1.3b --init Wan2.1-T2V-1.3B-Diffusers --data shards --output"
            " runs/flow-map --micro-batch 2"
        ),
    )

    recipe: str = Field(description="what to train, see above")
    output: str | None = Field(
        None, description="folder of the run; one that holds a run is resumed"
    )
    init: str | None = Field(
        None, description="checkpoint to start from (tiny recipes: random weights)"
    )
    teacher: str | None = Field(None, description="checkpoint of the stage teacher, for on-policy")
    data: str = Field("synthetic", description="'synthetic', or a folder of shards")
    shard: int | None = Field(
        None, description="processes that share one copy of the weights; all by default"
    )
    device: str | None = Field(None, description="cpu or cuda; cuda where there is any")
    wandb: str | None = Field(
        None, description="Weights & Biases project to log to, besides TensorBoard"
    )
    show: bool = Field(False, description="print the recipe as JSON, and do nothing")


def make_options_type() -> type[TrainOptions]:
    """Make the options class with one more flag for each setting of a recipe."""
    from anyflow_deploy.training.recipes import recipe_fields

    settings: dict[str, Any] = {
        name: (str | None, Field(None, description=f"setting of the recipe ({group or 'data'})"))
        for name, group, _ in recipe_fields()
    }
    return create_model(
        "FullTrainOptions", __base__=TrainOptions, __doc__=TrainOptions.__doc__, **settings
    )


def work(options: TrainOptions) -> int:
    """Resolve the recipe, then show it or train; return the exit status."""
    from anyflow_deploy.training.recipes import (
        get_recipe,
        override_recipe,
        recipe_fields,
        recipe_to_dict,
    )

    values = {
        name: getattr(options, name)
        for name, _, _ in recipe_fields()
        if getattr(options, name) is not None
    }
    recipe = override_recipe(get_recipe(options.recipe), values)
    if options.show:
        print_json(recipe_to_dict(recipe))
        return 0
    return _train(options, recipe)


def _train(options: TrainOptions, recipe: Any) -> int:
    from pathlib import Path

    from anyflow_deploy.errors import AnyFlowError
    from anyflow_deploy.training.run_spec import RunSpec
    from anyflow_deploy.training.trainer import train

    if options.output is None:
        raise AnyFlowError("--output is missing: the folder of the run.")
    init, teacher = (
        None if path is None else Path(path) for path in (options.init, options.teacher)
    )
    train(
        RunSpec(
            recipe,
            Path(options.output),
            init,
            teacher,
            options.data,
            options.shard,
            options.device,
            options.wandb,
        )
    )
    return 0


def main() -> None:
    """Run `python -m anyflow_deploy.train` with the flags of the command line."""
    run(PROGRAM, make_options_type(), work)
