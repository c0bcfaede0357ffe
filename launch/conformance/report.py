"""From the lines that rank 0 wrote to a report, complete also where the ranks died, and the report as text or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .verdicts import DIFFERS, FAILED, GROUPS, NEW, Row, exit_code, summary

_NOT_REACHED = "skipped: the probe before it did not end"
UNREPORTED = "nobody has reported a run on a real chip of this vendor yet"
EMULATION = "an emulation follows the vendor table: it tests this package, and says nothing of a chip"


@dataclass(frozen=True)
class Report:
    """header: see plan.py and suite.header. ended: "" where every probe ended, else how the ranks did."""

    header: dict[str, Any]
    rows: tuple[Row, ...]
    ended: str = ""

    @property
    def exit_code(self) -> int:
        return 1 if self.ended else exit_code(row.verdict for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        return {
            "header": self.header,
            "rows": [row.as_dict() for row in self.rows],
            "summary": summary(row.verdict for row in self.rows),
            "ended": self.ended,
            "exit_code": self.exit_code,
        }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What rank 0 wrote. A last line that was cut off, because the rank was killed while it wrote, is left out."""
    messages = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            messages.append(json.loads(line))
        except ValueError:
            break
    return messages


def complete(header: dict[str, Any], lines: Iterable[dict[str, Any]], ranks_ended: str, first: Sequence[Row]) -> Report:
    """The report from the launcher's header and rows, rank 0's lines, and how the ranks ended ("exit code 137").

    A probe that had begun and has no row failed; what was to come after it was skipped.
    """
    rows, over = list(first), False
    planned: list[tuple[str, str]] = []
    begun: tuple[str, str] | None = None
    for line in lines:
        header = header | line.get("header", {})
        if "plan" in line:
            planned = [(group, what) for group, what in line["plan"]]
        if "begin" in line:
            begun = (line["begin"][0], line["begin"][1])
        if "row" in line:
            rows.append(Row(**line["row"]))
        over = over or "end" in line
    done = {(row.group, row.what) for row in rows}

    def missing(probe: tuple[str, str], seen: str, verdict: str) -> Row:
        return Row(*probe, str(header["vendor"]), "-", "", "", seen, verdict, bool(header["emulated"]))

    if not planned:
        rows.append(missing(("cluster", "ranks met"), f"the ranks ended before a probe ({ranks_ended})", FAILED))
    if begun is not None and begun not in done:
        rows.append(missing(begun, f"the ranks ended in the middle of it ({ranks_ended})", FAILED))
    rows += [missing(probe, "", _NOT_REACHED) for probe in planned if probe not in done and probe != begun]
    rows.sort(key=lambda row: GROUPS.index(row.group))
    return Report(header, tuple(rows), "" if over else f"not every probe was run: the ranks ended with {ranks_ended}")


# ---------------------------------------------------------------- text


def header_lines(header: dict[str, Any]) -> list[str]:
    """The report's head, for people."""
    ranks = header.get("ranks", [])
    real = [rank["rank"] for rank in ranks if not rank["emulated"]]
    mark = f" (EMULATED{f', but for ranks {real}' if real else ': no chip was here'})" if header["emulated"] else ""
    pairs = [
        ("vendor", f"{header['title']}{mark}"),
        ("versions", _versions(header, ranks)),
        ("evidence", header["evidence"]),
        ("ranks", f"{header['num_ranks']}" + (f" over {header['transport']}" if "transport" in header else "")),
    ]
    pairs += [(f"rank {rank['rank']}", _rank_line(rank)) for rank in ranks]
    pairs += [("paths" if not number else "", line) for number, line in enumerate(header.get("paths", []))]
    pairs += [("note", note) for note in header["notes"]]
    if "users_cluster" in header:
        vendors = dict.fromkeys(rank["place"].split()[0] for rank in ranks)
        pairs += [("note", f"{name}: {UNREPORTED}") for name in vendors if name != "cpu"]
    return [f"{name:<10}{text}" for name, text in pairs]


def _rank_line(rank: dict[str, Any]) -> str:
    return f"{rank['host']}, {rank['place']}, {rank['device']} ({rank['device_name']}), memory {rank['memory']}"


def _versions(header: dict[str, Any], ranks: list[dict[str, Any]]) -> str:
    """The launcher's where no rank has spoken; theirs otherwise, told apart where they differ, which is allowed."""
    spoken: dict[str, list[int]] = {}
    for rank in ranks or [header["launcher"] | {"rank": -1}]:
        text = f"moe-runtime {rank['moe_runtime']}, torch {rank['torch']}, Python {rank['python']}"
        spoken.setdefault(text, []).append(rank["rank"])
    if len(spoken) == 1:
        return next(iter(spoken))
    return "; ".join(f"{text} on ranks {numbers}" for text, numbers in spoken.items()) + " (they may differ)"


_HEADINGS = ("what", "claimed", "seen", "verdict")


def _cells(row: Row, several: bool) -> tuple[str, str, str, str]:
    what = f"{row.what} [{row.vendor}]" if several and "," not in row.vendor else row.what  # else of all ranks
    verdict, colon, why = row.verdict.partition(":")
    return what, row.claimed, row.seen or "-", verdict + " (emulated)" * row.emulated + colon + why


def show(report: Report, out: TextIO) -> None:
    """Header, table, summary and what to paste; the table by rich on a terminal, else aligned text."""
    for line in header_lines(report.header):
        print(line, file=out)
    print(file=out)
    several = len({rank["place"] for rank in report.header.get("ranks", [])}) > 1
    if out.isatty():
        _rich_table(report.rows, several, out)
    else:
        print("\n".join(plain_table(report.rows, several)), file=out)
    print(file=out)
    if report.ended:
        print(report.ended, file=out)
    print(f"{len(report.rows)} rows: {summary(row.verdict for row in report.rows)}", file=out)
    block = paste_block(report)
    if block:
        print(f"\npaste this into an issue, with {report.header['report_file']}:\n", file=out)
        print("\n".join(block), file=out)


_WIDEST = (46, 34, 58)  # columns of a terminal


def plain_table(rows: Sequence[Row], several: bool) -> list[str]:
    """Aligned lines; long cells are cut, and whole in --json."""
    cells = [_cells(row, several) for row in rows]
    widths = [
        min(widest, max(cell_len(line[column]) for line in [*cells, _HEADINGS]))
        for column, widest in enumerate(_WIDEST)
    ]
    lines, group = [], None
    for row, line in zip(rows, cells, strict=True):
        if row.group != group:
            group = row.group
            lines += ["", f"{group}:", _aligned(_HEADINGS, widths)]
        lines.append(_aligned(line, widths))
    return lines[1:]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        set_cell_size(cell if cell_len(cell) <= width else set_cell_size(cell, width - 3) + "...", width)
        for cell, width in zip(cells, widths, strict=False)
    ]
    return "  " + "  ".join([*padded, cells[-1]])


def _rich_table(rows: Sequence[Row], several: bool, out: TextIO) -> None:
    colours = {FAILED: "bold red", DIFFERS: "bold red", NEW: "yellow"}
    table, group = Table(show_lines=False), None
    for heading in ("group", *_HEADINGS):
        table.add_column(heading, overflow="fold")
    for row in rows:
        cells = [Text(text, style=colours.get(row.verdict, "")) for text in _cells(row, several)]
        table.add_row(row.group if row.group != group else "", *cells)
        group = row.group
    Console(file=out).print(table)


def paste_block(report: Report) -> list[str]:
    """A fenced block of what somebody else should see, from real devices only; [] where there is nothing to tell."""
    rows = [row for row in report.rows if row.verdict in (DIFFERS, FAILED, NEW) and not row.emulated]
    if not rows:
        return []
    lines = ["```", "moe-launch check", *header_lines(report.header)]
    for row in rows:
        lines += [f"{row.verdict}: {row.group}, {row.what} [{row.vendor}]", f"  claimed: {row.claimed}"]
        lines += [f"  source:  {row.source} ({row.confidence})"] if row.source else []
        lines += [f"  seen:    {row.seen}"]
    return [*lines, "```"]


def write(report: Report, as_json: bool) -> None:
    """To stdout: one JSON object, or the text."""
    if as_json:
        print(json.dumps(report.as_dict(), ensure_ascii=False))
    else:
        show(report, sys.stdout)


def with_report_file(report: Report, path: Path) -> Report:
    return replace(report, header=report.header | {"report_file": str(path)})
