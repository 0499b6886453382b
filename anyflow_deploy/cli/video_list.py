"""Which videos a run of `anyflow-generate` makes: every prompt with every seed, and their names.

`{index}`, `{seed}` and `{prompt}` in --output tell them apart. Everything is checked here before
the bundle is opened: the file of prompts, the names, and whether each can be written.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow_deploy.bundle.outputs import OutputFile
from anyflow_deploy.cli.generate_options import GenerateOptions
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.pipelines.prompt_file import read_prompts

_SLUG_CHARACTERS, _SLUG_BYTES = 40, 120
_EXCERPT = 60


@dataclass(frozen=True)
class ListedVideo:
    """A video that a run makes.

    Attributes:
        index: 1 for the first.
        prompt: what to show; None where saved embeddings say it.
        seed: of the noise.
        output: where it goes.
    """

    index: int
    prompt: str | None
    seed: int
    output: Path

    def describe(self, count: int) -> str:
        """Name the video among `count`, such as `2 of 6: fox-2.mp4, seed 2, "a red fox"`."""
        prompt = "" if self.prompt is None else f', "{excerpt(self.prompt)}"'
        return f"{self.index} of {count}: {self.output}, seed {self.seed}{prompt}"

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` says of every video."""
        return {
            "index": self.index,
            "prompt": self.prompt,
            "seed": self.seed,
            "output": str(self.output),
        }


def list_videos(options: GenerateOptions) -> list[ListedVideo]:
    """List the videos in the order in which they are made: all seeds of a prompt, then the next.

    Raises:
        AnyFlowError: a file without prompts, or one name for two videos.
    """
    prompts: tuple[str | None, ...] = (options.prompt,)
    if options.prompts is not None:
        prompts = read_prompts(options.prompts)
    seeds = options.seeds or (draw_seed() if options.seed == -1 else options.seed,)
    twice = [seed for seed, count in Counter(seeds).items() if count > 1]
    if twice:
        raise AnyFlowError(f"--seeds has {twice[0]} twice; give each seed once.")
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    digits = len(str(len(pairs)))
    videos = [
        ListedVideo(n, prompt, seed, name_output(options.output, f"{n:0{digits}}", seed, prompt))
        for n, (prompt, seed) in enumerate(pairs, start=1)
    ]
    _check_names(options, videos)
    return videos


def draw_seed() -> int:
    """Draw a seed, from 0 to 2**32 - 1."""
    return secrets.randbelow(2**32)


def check_outputs(options: GenerateOptions, videos: list[ListedVideo]) -> None:
    """Try every name that the run will write, in its folder.

    Raises:
        OutputError: one is taken, or cannot be written.
    """
    for video in videos:
        OutputFile(video.output, options.overwrite)
    if options.save_prompt_embeds is not None:
        OutputFile(options.save_prompt_embeds, options.overwrite)


def name_output(pattern: Path, index: str, seed: int, prompt: str | None) -> Path:
    """Fill the placeholders of --output; other words in braces stay as they are.

    Raises:
        AnyFlowError: `{prompt}` where embeddings take the place of the prompt.
    """
    name = str(pattern).replace("{index}", index).replace("{seed}", str(seed))
    if "{prompt}" in name:
        if prompt is None:
            raise AnyFlowError(
                f"--output is {pattern}, and --prompt-embeds has no prompt to name it by. Use"
                " {index} or {seed}."
            )
        name = name.replace("{prompt}", make_slug(prompt))
    return Path(name)


def make_slug(prompt: str) -> str:
    """Make a part of a file's name of the beginning of a prompt: letters, digits and dashes."""
    words = re.sub(r"[\W_]+", "-", prompt.casefold()).strip("-")[:_SLUG_CHARACTERS]
    return words.encode()[:_SLUG_BYTES].decode(errors="ignore").strip("-") or "prompt"


def excerpt(text: str) -> str:
    """Return the beginning of a text, for a message."""
    return text if len(text) <= _EXCERPT else f"{text[: _EXCERPT - 1]}…"


def _check_names(options: GenerateOptions, videos: list[ListedVideo]) -> None:
    names = Counter(video.output for video in videos)
    name, count = names.most_common(1)[0]
    if count > 1:
        better = options.output.with_name(f"{options.output.stem}-{{index}}{options.output.suffix}")
        raise AnyFlowError(
            f"this run makes {len(videos)} videos, and --output {options.output} gives {count} of"
            f" them the name {name}. Put {{index}} into it, as {better}, or {{seed}} or {{prompt}}."
        )
    if options.save_prompt_embeds in names:
        raise AnyFlowError(
            f"--output and --save-prompt-embeds are both {options.save_prompt_embeds}. Give two"
            " names."
        )
