"""`python -m anyflow_deploy.shapes FOLDER`: train the `shapes` models from nothing.

docs/tutorials/distil-your-own.md tells every stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from anyflow_deploy.cli.options import Options, run
from anyflow_deploy.errors import AnyFlowError, suggestion
from anyflow_deploy.progress import RichProgress, console

PROGRAM = "python -m anyflow_deploy.shapes"


class ShapesOptions(Options):
    """Train the small models `shapes` and `far-shapes` from nothing: every part of a pipeline.

    The same command resumes where it was stopped. All of it takes some hours on two cores.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("folder",)
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        f"{PROGRAM} runs/shapes",
        f"{PROGRAM} runs/shapes --until shapes",
    )

    folder: str = Field(description="folder of all results")
    until: str = Field("far-shapes", description="last stage: base, latents, teacher, …")
    seed: int = Field(0, ge=0, description="of weights, scenes and noise")
    scenes: int = Field(
        4000, ge=250, multiple_of=250, description="videos of the training data, a multiple of 250"
    )
    compute: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="type of large products; bfloat16 is twice as fast on GPUs and on processors"
        " with AMX",
    )
    compile: bool = Field(False, description="torch.compile the transformers' layers")
    device: str | None = Field(None, description="cpu or cuda; cuda where there is any")


def work(options: ShapesOptions) -> int:
    """Run the stages up to the last one that is requested."""
    from anyflow_deploy.training.shapes.stages import ShapesJob, stages

    job = ShapesJob(
        Path(options.folder),
        options.seed,
        options.scenes,
        compute=options.compute,
        device=options.device,
        settings={"compile": "true"} if options.compile else {},
    )
    todo = stages(job)
    if options.until not in todo:
        raise AnyFlowError(
            f"--until is {options.until!r}; allowed are {', '.join(todo)}."
            f"{suggestion(options.until, todo)}"
        )
    for name, stage in todo.items():
        console.print(f"[bold]{name}[/]")
        with RichProgress() as progress:
            stage(progress)
        if name == options.until:
            break
    return 0


def main() -> None:
    """Run `python -m anyflow_deploy.shapes` with the flags of the command line."""
    run(PROGRAM, ShapesOptions, work)
