"""Draws a report: Markdown beside its figures, and one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from sinterlm.bench.published import SOURCE
from sinterlm.bench.raw import write_whole
from sinterlm.bench.report.data import ReportData
from sinterlm.bench.report.figures import Drawing
from sinterlm.bench.report.tables import Table, all_tables, commands, setting

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: right;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left }
td.text { text-align: left; white-space: normal }
.scroll { overflow-x: auto } .note { color: #555; font-size: 13px }
svg { max-width: 100%; height: auto }
pre { background: #f5f5f5; padding: .6rem; overflow-x: auto; font-size: 12px }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #161616 }
  pre { background: #222 } th, td { border-color: #333 } .note { color: #aaa }
  svg { background: #fff } }
"""


def write_report(folder: Path, data: ReportData, drawings: Sequence[Drawing]) -> list[Path]:
    """``report.md``, ``report.html`` and ``figures/``; their paths. Raises ResourceError."""
    title = f"{data.plan.model}: {', '.join(data.arms)}"
    tables = all_tables(data)
    for drawing in drawings:
        drawing.write(folder / "figures")
    write_whole(folder / "report.md", _markdown(title, data, tables, drawings))
    write_whole(folder / "report.html", _html(title, data, tables, drawings))
    return [folder / "report.md", folder / "report.html"]


def _lead(data: ReportData) -> str:
    failed = sum(point.failure is not None for point in data.points)
    kind = "HTTP against HTTP" if data.plan.mode == "serve" else "offline against offline"
    text = f"Measured by `sinterlm bench sweep`, {kind}; every figure is computed from raw data."
    if data.plan.rounds < 5:
        text += (
            f" {data.plan.rounds} round{'s' * (data.plan.rounds > 1)} only: intervals of fewer than"
            " five rounds are coarse, and there are none of a single one."
        )
    if failed:
        text += f" Points that failed: {failed}; they are listed."
    return text


def _markdown(
    title: str, data: ReportData, tables: Sequence[Table], drawings: Sequence[Drawing]
) -> str:
    parts = [f"# {title}", _lead(data), _markdown_table(setting(data))]
    parts += [f"![{one.title}](figures/{one.name}.svg)" for one in drawings]
    parts += [_markdown_table(table) for table in tables]
    lines = [f"# {what}\n{command}" for what, command in commands(data)]
    parts += ["## Commands", "```sh\n" + "\n".join(lines) + "\n```"]
    if any(one.name == "published" for one in drawings):
        parts.append(f"The series of QwQ-32B are {SOURCE}.")
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(table.columns) - 1)
    lines = [f"## {table.title}", "", row(table.columns), rule, *map(row, table.rows)]
    return "\n".join(lines) + (f"\n\n{table.note}" if table.note else "")


def _html(
    title: str, data: ReportData, tables: Sequence[Table], drawings: Sequence[Drawing]
) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(_lead(data))}</p>"]
    parts.append(_html_table(setting(data)))
    for drawing in drawings:
        parts.append(f"<h2>{html.escape(drawing.title)}</h2>\n{drawing.svg()}")
    parts += [_html_table(table) for table in tables]
    parts.append("<h2>Commands</h2>")
    for what, command in commands(data):
        parts.append(f"<h3>{html.escape(what)}</h3><pre>{html.escape(command)}</pre>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td{_kind(cell)}>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in table.rows
    )
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f"<h2>{html.escape(table.title)}</h2>\n<div class='scroll'><table><thead><tr>{head}</tr>"
        f"</thead><tbody>{rows}</tbody></table></div>{note}"
    )


def _kind(cell: str) -> str:
    return ' class="text"' if len(cell) > 40 else ""
