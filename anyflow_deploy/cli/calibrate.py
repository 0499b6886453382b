"""`anyflow-calibrate`: measure activation ranges once for all 8-bit exports of some weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from rich.markup import escape

from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.cli.json_output import print_json
from anyflow_deploy.cli.options import JsonFlag, Seeds, Steps, run
from anyflow_deploy.cli.weights import WeightOptions
from anyflow_deploy.memory.parameter_shapes import parameter_shapes
from anyflow_deploy.progress import Progress, RichProgress, console
from anyflow_deploy.quantization.calibration import CALIBRATION, Calibration

if TYPE_CHECKING:  # torch, which --help does not need
    from anyflow_deploy.checkpoints.weights import Weights


class CalibrateOptions(WeightOptions):
    """Measure activation ranges for int8 and fp8 over rollouts of many lengths, in float32.

    ModelOpt measures them. If a calibration is interrupted, the same command resumes it. Prompts
    are left out once no range grows any more; --thorough runs all of them. A smaller video is
    faster; the size that will be generated is the safest.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "anyflow-calibrate --model 1.3b --device cuda",
        (
            "anyflow-calibrate --checkpoint my-anyflow --prompts prompts.txt --frames 17 --height"
            " 256 --width 448"
        ),
    )

    prompts: Path | None = Field(
        None, description="text file, one prompt a line (default: eight built-in ones)"
    )
    steps: Steps = Field(
        (1, 2, 4, 8), min_length=1, description="step counts; sweeps over all times are added"
    )
    seeds: Seeds = Field((0,), min_length=1, description="seeds of the noise")
    thorough: bool = Field(
        False, description="run every prompt, one at a time, over a causal model's whole video"
    )
    frames: int | None = Field(
        None,
        ge=1,
        description="frames of the video, 4n+1 (default: the model's; causal: its first chunks)",
    )
    height: int | None = Field(None, ge=1, description="pixels, a multiple of 16")
    width: int | None = Field(None, ge=1, description="pixels, a multiple of 16")
    device: str = Field("cpu", description="torch device, as cpu or cuda")
    output: Path = Field(Path(CALIBRATION), description="file to write")
    overwrite: bool = Field(False, description="replace --output")
    json_output: JsonFlag = False


def calibrate(options: CalibrateOptions) -> int:
    """Calibrate and write the file; return the exit status."""
    from anyflow_deploy.checkpoints.weights import check_parameters
    from anyflow_deploy.export.quantization.calibrate import (
        calibration_checkpoint_path,
        write_calibration,
    )

    start = time.perf_counter()
    with OutputFile(options.output, options.overwrite, "--output") as output:
        weights = options.weights()
        check_parameters(weights, parameter_shapes(weights.architecture))
        with RichProgress(console) as bars:
            calibration = measure_calibration(options, weights, bars)
        write_calibration(output, calibration)
    calibration_checkpoint_path(options.output).unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    console.print(
        f"[green]calibrated[/] {len(calibration.tensors)} tensors in {seconds:.1f} s:"
        f" [bold]{escape(str(options.output))}[/]"
    )
    if options.json_output:
        print_json(
            {
                "output": str(options.output),
                "tensors": len(calibration.tensors),
                "prompts": list(calibration.prompts),
                "text": calibration.text,
                "weights": calibration.weights,
                "seconds": seconds,
            }
        )
    return 0


def measure_calibration(options: CalibrateOptions, weights: Weights, bars: Progress) -> Calibration:
    """Run the calibration that the options ask for.

    It keeps its rollouts in `calibration_checkpoint_path(options.output)`. The caller removes that
    file once the calibration is on disk.
    """
    from anyflow_deploy.export.quantization.calibrate import (
        CalibrationSettings,
        calibration_checkpoint_path,
        run_calibration,
    )
    from anyflow_deploy.export.quantization.modelopt_loader import load_modelopt
    from anyflow_deploy.export.quantization.prompts import PROMPTS, embed_prompts, read_prompts
    from anyflow_deploy.export.quantization.rollouts import calibration_shape

    prompts = PROMPTS if options.prompts is None else read_prompts(options.prompts)
    a = weights.architecture
    shape = calibration_shape(a, options.frames, options.height, options.width, options.thorough)
    checkpoint_path = calibration_checkpoint_path(options.output)
    with bars.stage("loading ModelOpt"):
        load_modelopt()
    with bars.stage(f"embedding {len(prompts)} prompts"):
        text = embed_prompts(weights, prompts)
    if text.source == "random":
        console.print(
            "[yellow]no text encoder[/] with these weights: random embeddings stand in for the"
            " prompts."
        )
    settings = CalibrationSettings(
        text,
        shape,
        options.steps,
        options.seeds,
        options.device,
        checkpoint_path,
        lambda line: console.print(escape(line)),
        options.thorough,
    )
    try:
        return run_calibration(weights, settings, bars)
    except KeyboardInterrupt:
        console.print("finished rollouts are kept; the same command resumes from there.")
        raise


def main() -> None:
    """Run `anyflow-calibrate` with the flags of the command line."""
    run("anyflow-calibrate", CalibrateOptions, calibrate)
