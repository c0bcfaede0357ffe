"""Whose fault the end of a job's attempt was: a rank that lost a peer, or waited for it in vain, is a consequence.

What ranks wrote and what the kernel says of them goes in, a rank's number comes out; processes are left as they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from .output import last_traceback

_CONSEQUENCES = ("PeerLost", "PeerTimeout")
_SPEAKER = re.compile(r"^rank \d+\b")
_NAMED = re.compile(r"\branks? \[?(\d+(?:, \d+)*)")


def blamed(stderr_tail: Sequence[str]) -> tuple[int, ...] | None:
    """The ranks that a rank's last error says it lost or waited for; None where its end was its own.

    () where that error names none. Messages of both errors begin with the rank that speaks, if with any.
    """
    for line in reversed(last_traceback(stderr_tail)[-5:]):
        kind, _, message = line.partition(": ")
        if kind.endswith(_CONSEQUENCES):
            named = _NAMED.findall(_SPEAKER.sub("", message))
            return tuple(dict.fromkeys(int(rank) for ranks in named for rank in ranks.split(", ")))
    return None


def culprit(failed: Mapping[int, tuple[int, ...] | None], running: Collection[int], stopped: Iterable[int]) -> int:
    """The rank to name. failed: in the order of their ends, `blamed` of each rank that has failed; at least one.

    One whose end was its own; else one that is stopped; else the running one that most blame; else the first.
    """
    for rank, blames in failed.items():
        if blames is None:
            return rank
    for rank in sorted(stopped):
        return rank
    votes = Counter(rank for blames in failed.values() for rank in blames or () if rank in running)
    return min(votes, key=lambda rank: (-votes[rank], rank), default=next(iter(failed)))


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP or its like keeps a process from running. One that a debugger holds is not meant."""
    return _stat(pid)[:1] == ["T"]


def children(parent: int) -> list[int]:
    """A process's children."""
    found = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
    return [pid for pid in found if _stat(pid)[1:2] == [str(parent)]]


def rank_of(pid: int) -> int | None:
    """RANK in the environment that a process was started with."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(v[5:]) for v in variables if v.startswith(b"RANK=") and v[5:].isdigit()), None)


class StoppedFor:
    """How long processes have been stopped, counted in looks and not by a clock.

    Who was stopped together with them (a scheduler suspends whole jobs) must not take that time for theirs.
    """

    def __init__(self, looks: int) -> None:
        self._most, self._seen = looks, Counter[int]()

    def look(self, pids: Iterable[int]) -> list[int]:
        """Those that this look, and each of those before it, found stopped: `looks` in a row."""
        stopped = [pid for pid in pids if is_stopped(pid)]
        self._seen = Counter({pid: self._seen[pid] + 1 for pid in stopped})
        return [pid for pid in stopped if self._seen[pid] >= self._most]


def where_it_is(stderr_tail: Sequence[str], most: int = 25) -> list[str]:
    """The main thread's stack in what faulthandler wrote when it was asked to (worker.py); [] where it did not."""
    starts = [n for n, line in enumerate(stderr_tail) if line.startswith("Current thread 0x")]
    if not starts:
        return []
    stack = []
    for line in stderr_tail[starts[-1] + 1 :]:
        if not line.startswith("  "):
            break
        stack.append(line)
    return stack[:most]


def last_error(stderr_tail: Sequence[str]) -> str:
    """The last line of the last traceback, or of all."""
    return next(reversed(last_traceback(stderr_tail) or list(stderr_tail)), "it wrote no stderr")


def _stat(pid: int) -> list[str]:
    """Its state and its parent, and what follows in proc(5)'s stat; [] when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
