"""The fields that docs/reference/json.md lists."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "reference" / "json.md").read_text()


def documented_fields(command: str, heading: str = "field") -> set[str]:
    """The fields of a command's document, from the table of that heading."""
    section = PAGE.split(f"## {command}\n", 1)[1].split("\n## ")[0]
    table = section.split(f"| {heading} | |\n|---|---|\n", 1)[1].split("\n\n")[0]
    return set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
