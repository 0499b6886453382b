"""Progress bars for long work.

Functions that take long accept a `Progress`: they announce a stage with its amount of work and
advance it. The command line passes one that draws with rich on standard error; library users see
nothing unless they pass their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)
"""Everything for people goes to standard error; standard output is for what a program may read."""


Advance = Callable[[float], None]


class Progress(Protocol):
    """Interface through which long work reports its stages."""

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Advance]:
        """Enter a stage of `total` units (None: unknown); call the result with the units done."""
        ...


class NullProgress:
    """Shows nothing."""

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Advance]:
        """Enter a stage, and show nothing."""
        yield lambda amount: None


class RichProgress:
    """Draws one bar for each stage; a context manager around all the work."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.progress import (  # not needed for --help and refusals
            BarColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichBars

        columns = (
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = RichBars(*columns, console=console or Console(stderr=True))

    def __enter__(self) -> RichProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Advance]:
        """Draw the bar of a stage of `total` units (None: unknown)."""
        # Not started earlier, so that an error before the first stage does not follow an empty
        # line.
        self._progress.start()
        task = self._progress.add_task(name, total=total)
        yield lambda amount: self._progress.advance(task, amount)
        units = total if total is not None else 1
        self._progress.update(task, total=units, completed=units)
