"""Progress shows on a terminal, and only messages for people elsewhere; tables fit in a pipe."""

from __future__ import annotations

import sys

import pytest

from sinterlm.commands.ui import TerminalProgress, print_table, show_count


def work(progress: TerminalProgress) -> None:
    with progress:
        progress.stage("pack weights", 100, "B")
        progress.advance(60)
        progress.notify("packing needs [100 B] of disk")
        progress.stage("compile library")


def test_a_pipe_gets_messages_alone(capsys: pytest.CaptureFixture[str]) -> None:
    work(TerminalProgress())
    out, err = capsys.readouterr()
    assert (out, err) == ("", "packing needs [100 B] of disk\n")


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    work(TerminalProgress(quiet=True))
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    work(TerminalProgress())
    out, err = capsys.readouterr()
    assert out == ""
    for words in ("pack weights", "packing needs [100 B] of disk", "compile library"):
        assert words in err


def test_tables_show_brackets_and_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Things", ["name", "count"], [("[bold]x", 3), ("y" * 60, 4)], right=(1,))
    out = capsys.readouterr().out
    assert "[bold]x" in out
    assert "y" * 60 in out


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1500, "1.5 k"), (2.5e9, "2.5 G"), (3e12, "3 T")],
)
def test_counts(count: float, text: str) -> None:
    assert show_count(count) == text
