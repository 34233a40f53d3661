"""What a run says while it works: plain lines and progress bars with the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[str], None]


class Reporter:
    """Talks to the terminal (standard error), or not.

    Args:
        quiet: nothing but errors.
        verbose: details too.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet, self.verbose = quiet, verbose
        self.console = Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def detail(self, text: str) -> None:
        if self.verbose:
            self.say(text)

    @contextmanager
    def bar(self, task: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A progress bar; the yielded function advances it by one and shows a note beside it."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        if not self.console.is_terminal:
            self.say(f"{task} ({total} steps)")
        with Progress(*columns, console=self.console, disable=self.quiet or not self.console.is_terminal) as progress:
            identity = progress.add_task(task, total=total, completed=done, note="")
            yield lambda note="": progress.update(identity, advance=1, note=note)
