"""Hang reports: what all ranks were doing when some waited in vain, as a record for the log folder and in words.

docs/hangs.md has the fields. A report is made before any rank is killed, so that the stack of the stuck one is in it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .coordinator import _Rank

NO_ANSWER = "no answer: the whole process is stopped, or cut off"
_SHOWN = 16  # ranks in words; the file has all


def build(view: int, members: Sequence[_Rank], stuck: int | None, why: str, now: float) -> dict[str, Any]:
    """The record. stuck: the rank that is to blame, if one is."""
    reports = [rank for rank in members if rank.report is not None]
    return {
        "view": view,
        "stuck": stuck,
        "why": why,
        "waits": [
            {"rank": rank.number, "for": rank.report["suspects"], "why": rank.report["why"]}
            for rank in reports
            if rank.report is not None
        ],
        "ranks": [
            {
                "rank": rank.number,
                "host": rank.host,
                "pid": rank.pid,
                "heard_s": round(now - rank.heard, 3),
                "at": (rank.stacks or {}).get("state", rank.phase),
                "stacks": (rank.stacks or {}).get("text", NO_ANSWER),
            }
            for rank in members
        ],
    }


def in_words(report: dict[str, Any], path: object) -> str:
    """A line for the whole, one for each rank, and where the stacks are."""
    waits = {wait["rank"]: wait for wait in report["waits"]}
    stuck = report["stuck"]
    lines = [f"hang in view {report['view']}: {report['why']}"]
    # The stuck rank first, then those that wait: where not all are shown, these are.
    ranks = sorted(report["ranks"], key=lambda rank: (rank["rank"] != stuck, rank["rank"] not in waits))
    lines += [f"  {_line(rank, waits.get(rank['rank']), rank['rank'] == stuck)}" for rank in ranks[:_SHOWN]]
    if len(ranks) > _SHOWN:
        lines.append(f"  and {len(ranks) - _SHOWN} ranks more")
    lines.append(f"  stacks of all ranks: {path}")
    return "\n".join(lines)


def _line(rank: dict[str, Any], wait: dict[str, Any] | None, is_stuck: bool) -> str:
    told = [f"rank {rank['rank']} (host {rank['host']}, pid {rank['pid']}): {where(rank['at'])}"]
    if wait is not None:
        whom = names(wait["for"]) if wait["for"] else "somebody it cannot name"
        told.append(f"waits for {whom}: {wait['why']}")
    elif rank["stacks"] == NO_ANSWER:
        told.append(f"silent for {rank['heard_s']:.1f} s; its stack cannot be had, {NO_ANSWER.partition(': ')[2]}")
    elif is_stuck:
        told.append(f"waits for nobody; its main thread is {innermost(rank['stacks'])}")
    return "; ".join(told)


def where(at: dict[str, Any]) -> str:
    """What a rank was doing, from its progress (LayerState.note) or whatever it said of its phase."""
    told = str(at.get("phase", "has not said what it does"))
    if "layer" in at:
        told += f" of layer {at['layer']}" if told != "dense" else f", after expert layer {at['layer']}"
        told += f", pass {at.get('pass')}, {at.get('tokens', 0)} tokens"
    for name, word in (("sent", "to"), ("received", "from")):
        if at.get(name):
            told += f", rows {word} each rank {list(at[name])}"
    return told


def names(ranks: Sequence[int]) -> str:
    """`rank 1`, `ranks 1, 2`; of many the first ones and how many more."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s'[: len(ranks) > 1]} {', '.join(map(str, ranks[:8]))}{more}"


def innermost(stacks: str) -> str:
    """Where the main thread is: `in function (file:line)`."""
    threads = re.split(r"^thread (.+):$", stacks, flags=re.MULTILINE)[1:]
    of = dict(zip(threads[::2], threads[1::2], strict=True))
    frames = re.findall(r'^  File "(.+)", line (\d+), in (.+)$', of.get("MainThread", stacks), flags=re.MULTILINE)
    return f"in {frames[-1][2]} ({frames[-1][0]}:{frames[-1][1]})" if frames else "nowhere in Python"
