"""What a terminal shows beside the answer: progress bars, tables, sizes in words.

Everything goes to stderr except tables, which are the answer of the commands that print them. Bars
appear only where stderr is a terminal; elsewhere only the messages a person should read do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


def show_count(count: float, unit: str = "") -> str:
    """``2.5e9`` -> ``2.5 G`` followed by ``unit``."""
    for prefix in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.3g} {prefix}{unit}".rstrip()
        count /= 1000
    return f"{count:.3g} T{unit}"


class TerminalProgress:
    """Progress bars of compiling and loading, as a context manager; see ``artifact.progress``.

    ``quiet`` shows nothing at all.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None
        self.num_stages = 0  #: begun so far; a bundle found in the cache takes none
        self._quiet = quiet
        self._show = not quiet and sys.stderr.isatty()

    def __enter__(self) -> TerminalProgress:
        if self._show:
            self._bars = _bars()
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._end_stage()
        if self._bars is not None:
            self._bars.stop()

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """End the stage before and show ``name``; ``total`` None = a bar that only pulses."""
        self._end_stage()
        self.num_stages += 1
        if self._bars is not None:
            self._task = self._bars.add_task(name, total=total, unit=unit)

    def advance(self, amount: int) -> None:
        """``amount`` more of the current stage is done."""
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, amount)

    def notify(self, message: str) -> None:
        """A line for people, above the bars."""
        if self._bars is not None:
            self._bars.console.print(message, markup=False, highlight=False)
        elif not self._quiet:
            print(message, file=sys.stderr, flush=True)

    def _end_stage(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
        self._task = None


def _bars() -> RichProgress:
    """Bars on stderr that vanish when done, so that the answer stands alone."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()
) -> None:
    """A table on stdout; columns whose index is in ``right`` are aligned right."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=120)  # a pipe has no width; 80 would fold every row
    console.print(table)
