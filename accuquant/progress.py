"""What a run says while it works: plain lines and progress bars with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[str], None]
LOG_EVERY_SECONDS = 30.0


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
        """A progress bar; the yielded function advances it by one and shows a note beside it.

        Where there is no terminal, lines say now and then how far it is.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        lines = not self.console.is_terminal
        if lines:
            self.say(f"{task} ({total} steps)")
        with Progress(*columns, console=self.console, disable=self.quiet or lines) as progress:
            identity = progress.add_task(task, total=total, completed=done, note="")
            started = said = time.monotonic()

            def advance(note: str = "") -> None:
                nonlocal said
                progress.update(identity, advance=1, note=note)
                now, made = time.monotonic(), progress.tasks[0].completed - done
                if lines and now - said > LOG_EVERY_SECONDS:
                    left = (total - done - made) * (now - started) / made
                    self.say(f"{task}: {done + made:.0f} of {total}, {left:.0f} s left {note}")
                    said = now

            yield advance
