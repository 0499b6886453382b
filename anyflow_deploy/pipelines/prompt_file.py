"""A text file of prompts, one a line: what `--prompts` takes."""

from __future__ import annotations

import re
from pathlib import Path

from anyflow_deploy.errors import AnyFlowError


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read the prompts of a text file, one a line; empty lines are skipped.

    Raises:
        AnyFlowError: no such file, not UTF-8, or no prompt in it.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise AnyFlowError(
            f"{path} cannot be read: {error.strerror}. Give --prompts a text file, one prompt a"
            " line."
        ) from None
    except UnicodeDecodeError as error:
        raise AnyFlowError(
            f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8, one prompt a line."
        ) from None
    prompts = tuple(line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip())
    if not prompts:
        raise AnyFlowError(f"{path} holds no prompt. Write one a line, or leave --prompts out.")
    return prompts
