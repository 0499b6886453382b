"""`anyflow-precompute`: encode videos and captions to shards once, for all training."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from rich.markup import escape

from anyflow_deploy.cli.json_output import print_json
from anyflow_deploy.cli.options import DONE, JsonFlag, Options, run
from anyflow_deploy.models import TEXT_TOKENS
from anyflow_deploy.progress import RichProgress, console

PROGRAM = "anyflow-precompute"


class PrecomputeOptions(Options):
    """Encode a folder of videos with the VAE and the text encoder of a checkpoint, for training.

    NAME.txt beside NAME.mp4 is its caption. A video is taken from its start, at 16 frames a second,
    as a player shows it, scaled and cut to the size. Other files are counted and named. A video
    that cannot be used is skipped and listed in OUTPUT/skipped.jsonl; too many of them stop the
    command. The same command resumes stopped work. Training takes OUTPUT as --data.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("folder",)
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        f"{PROGRAM} clips --checkpoint Wan-AI/Wan2.1-T2V-1.3B-Diffusers --output shards",
        (
            f"{PROGRAM} clips --checkpoint pipeline --output shards --frames 17 --height 64 --width"
            " 96 --workers 2"
        ),
    )

    folder: Path = Field(
        description="videos (.mp4, .mov, .webm, .avi, …) and captions (.txt), also in subfolders"
    )
    checkpoint: str = Field(
        description="diffusers pipeline with VAE and text encoder: a folder, or a Hub id"
    )
    output: Path = Field(description="folder of the shards; an unfinished one is resumed")
    frames: int = Field(81, ge=1, description="frames of each video, 4n+1")
    height: int = Field(480, ge=8, description="pixels, a multiple of 16")
    width: int = Field(832, ge=8, description="pixels, a multiple of 16")
    fit: Literal["crop", "pad", "stretch"] = Field(
        "crop", description="how a video is brought to the size"
    )
    background: str = Field(
        "black",
        description="colour behind transparent pixels and around --fit pad, as white or #ff8000",
    )
    text_tokens: int = Field(TEXT_TOKENS, ge=1, description="longest caption")
    type: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the stored numbers; bfloat16 halves the shards"
    )
    shard_samples: int = Field(64, ge=1, description="videos in a shard, which is built in memory")
    workers: int = Field(
        0, ge=0, description="processes, each with its own encoders (0: one for each GPU)"
    )
    json_output: JsonFlag = False


def run_precompute(options: PrecomputeOptions) -> int:
    """Encode the videos and print what was written; return the exit status."""
    from anyflow_deploy.pipelines.frame_display import parse_color
    from anyflow_deploy.training.data.precompute import (
        SKIPPED,
        PrecomputeJob,
        find_pipeline,
        precompute,
    )

    background = parse_color(options.background)
    job = PrecomputeJob(
        options.folder,
        find_pipeline(options.checkpoint),
        options.output,
        (options.frames, options.height, options.width),
        options.text_tokens,
        options.type,
        options.shard_samples,
        options.workers,
        options.fit,
        background,
    )
    with RichProgress(console) as bars:
        count, skipped_count = precompute(job, bars, lambda text: console.print(escape(text)))
    console.print(f"[green]wrote[/] [bold]{escape(str(options.output))}[/] (of {count} videos)")
    skipped_list = options.output / SKIPPED
    if skipped_count:
        console.print(f"skipped {skipped_count}: {escape(str(skipped_list))} says which and why")
    if options.json_output:
        print_json(
            {
                "output": str(options.output),
                "videos": count,
                "skipped": skipped_count,
                "skipped_list": str(skipped_list) if skipped_list.is_file() else None,
            }
        )
    return DONE


def main() -> None:
    """Run `anyflow-precompute` with the flags of the command line."""
    run(PROGRAM, PrecomputeOptions, run_precompute)
