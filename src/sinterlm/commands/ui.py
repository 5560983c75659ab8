"""What a terminal shows beside the answer: progress, tables, sizes in words.

Everything goes to stderr except tables, which are the answer of the commands that print them. Bars
appear only where stderr is a terminal; elsewhere only the messages a person should read do.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from types import TracebackType

from sinterlm.commands.status_line import StatusLine

_PIPE_COLUMNS = 120  #: of a table where stdout is no terminal; 80 would fold every row
_MIN_WIDTH = 8  #: of a column that is narrowed
_MARGIN, _GAP = "  ", "  "


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
        self._line: StatusLine | None = None
        self.num_stages = 0  #: begun so far; a bundle found in the cache takes none
        self._quiet = quiet
        self._show = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __enter__(self) -> TerminalProgress:
        if self._show:
            self._line = StatusLine(sys.stderr)
            self._line.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._line is not None:
            self._line.stop()  # clear, so that the answer stands alone
            self._line = None

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """End the stage before and show ``name``; ``total`` None = no bar, only the time."""
        self.num_stages += 1
        if self._line is not None:
            self._line.begin_stage(name, total)

    def advance(self, amount: int) -> None:
        """``amount`` more of the current stage is done."""
        if self._line is not None:
            self._line.advance(amount)

    def notify(self, message: str) -> None:
        """A line for people, above the bar."""
        if self._line is not None:
            self._line.print(message)
        elif not self._quiet:
            print(message, file=sys.stderr, flush=True)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()
) -> None:
    """A table on stdout; columns whose index is in ``right`` are aligned right.

    Cells that the terminal has no room for are folded; a pipe, which has no width, gets 120 columns.
    """
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else _PIPE_COLUMNS
    table = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = fit_columns(table, room - len(_MARGIN))
    print(f"\x1b[1m{title}\x1b[0m" if is_terminal else title)
    for number, row in enumerate(table):
        for line in zip_longest(*map(fold, row, widths), fillvalue=""):
            aligned = (
                text.rjust(width) if index in right else text.ljust(width)
                for index, (text, width) in enumerate(zip(line, widths, strict=True))
            )
            print((_MARGIN + _GAP.join(aligned)).rstrip())
        if number == 0:
            print(_MARGIN + "-" * (sum(widths) + len(_GAP) * (len(widths) - 1)))
    print()


def fit_columns(table: Sequence[Sequence[str]], room: int) -> list[int]:
    """The width of every column of ``table``, the widest narrowed until all fit in ``room``; none
    below 8 for that, so that a line may be longer than the room where columns are many."""
    widths = [
        max(len(line) for cell in column for line in cell.split("\n"))
        for column in zip(*table, strict=True)
    ]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - room
    while excess > 0 and max(widths) > _MIN_WIDTH:
        widths[widths.index(max(widths))] -= 1
        excess -= 1
    return widths


def fold(cell: str, width: int) -> list[str]:
    """The lines of ``cell`` at that ``width``: between words where it can be, else inside one."""
    return [
        part
        for line in cell.split("\n")
        for part in (
            [line] if len(line) <= width else textwrap.wrap(line, width, break_on_hyphens=False)
        )
    ]
