"""What ranks print, on its way to console and logs: whole lines, progress bars thinned out, tracebacks found."""

from __future__ import annotations

import os
import re
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from .worker import USER_ERROR_CODE


class Sink:
    """A descriptor that several threads write to, one whole line a call.

    Its first failure is told, then all is dropped: a rank must never block on a pipe that nobody reads any more.
    """

    def __init__(self, descriptor: int, on_error: Callable[[OSError], None]) -> None:
        self._descriptor, self._on_error = descriptor, on_error
        self._lock = threading.Lock()
        self._works = True

    def write(self, data: bytes) -> None:
        with self._lock:
            while data and self._works:
                try:
                    data = data[os.write(self._descriptor, data) :]
                except BlockingIOError:  # whoever shares the terminal or pipe made it non-blocking
                    select.select([], [self._descriptor], [], 1.0)
                except OSError as error:
                    self._works = False
                    self._on_error(error)


class LineCutter:
    """Cuts a stream of bytes into lines of text.

    A progress bar redraws one line with carriage returns: of its states at most one a second becomes a line, and so
    does the one that a line feed ends. Cursor movements go (they would overwrite other ranks' lines), colours stay.
    """

    _END = re.compile(rb"\r*\n|\r+(?=[^\r\n])")  # a carriage return at the end may yet belong to a line feed
    _CURSOR = re.compile(r"\x1b\[[0-9;?]*[A-HJKSTfhl]")
    _LONGEST = 1 << 20

    def __init__(self, seconds_between_states: float = 1.0) -> None:
        self._pause = seconds_between_states
        self._next_state = 0.0
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[str]:
        self._rest += chunk
        start = 0
        for end in self._END.finditer(self._rest):
            line, start = self._rest[start : end.start()], end.end()
            if end.group().endswith(b"\n"):
                yield self._text(line)
            elif line.strip() and time.monotonic() >= self._next_state:
                self._next_state = time.monotonic() + self._pause
                yield self._text(line)
        self._rest = self._rest[start:]
        if len(self._rest) > self._LONGEST:
            yield from self.end()

    def end(self) -> Iterator[str]:
        if self._rest.strip():
            yield self._text(self._rest.rstrip(b"\r"))
        self._rest = b""

    def _text(self, line: bytes) -> str:
        return self._CURSOR.sub("", line.decode("utf-8", errors="replace"))


def is_shown(tee: str | None, rank: int, stream: str) -> bool:
    """Whether a rank's "out" or "err" goes to the console too; logs have everything.

    tee: torchrun's --tee: 1 is stdout, 2 stderr, 3 both, 0 neither, for all ranks; or 0:3,2:1 by rank (here of the
    whole job), others then neither. None: everything.
    """
    if tee is None:
        return True
    bits = dict(part.split(":") for part in tee.split(",")).get(str(rank), "0") if ":" in tee else tee
    return bool(int(bits) & (1 if stream == "out" else 2))


def failure_text(
    label: str, ending: str, code: int, stderr_tail: Sequence[str], log: object, blames: Sequence[int] = ()
) -> str:
    """What to tell of a rank that failed: a user's mistake in one line, anything else with its last traceback.

    blames: the ranks that it had lost or waited for, where their ends are not known.
    """
    if code == USER_ERROR_CODE:
        told = [line for line in stderr_tail if "error: " in line] or stderr_tail or ["no message"]
        return f"{label} ended with {ending}: {told[-1]} (log: {log})"
    hint = "; was the machine out of memory?" if ending.endswith("SIGKILL") else ""
    found = last_traceback(stderr_tail)
    heading = "its last traceback:" if found else "its last lines on stderr:" if stderr_tail else "it wrote no stderr"
    first = f"{label} failed first"
    if blames:
        first = f"rank{'s'[: len(blames) != 1]} {', '.join(map(str, blames))} failed first, by what {label} says"
    return "\n".join([f"{first}: {ending}{hint} (log: {log})", heading, *(found or stderr_tail[-10:])])


_OF_TORCH = re.compile(r"^\[rank\d+\]: ?")  # torch.distributed, where it has a group, puts it before tracebacks


def last_traceback(lines: Sequence[str]) -> list[str]:
    """The last Python traceback in some lines, with the exceptions it was chained to; [] when there is none."""
    lines = [_OF_TORCH.sub("", line) for line in lines]
    starts = [n for n, line in enumerate(lines) if line.startswith(("Traceback (most recent", "Fatal Python error:"))]
    if not starts:
        return []
    start = end = starts.pop()
    if lines[start].startswith("Fatal"):  # faulthandler's form: every thread, then a long list of modules
        return [line for line in lines[start : start + 60] if not line.startswith("Extension modules:")]
    for _ in range(2):  # the heading and its frames, then the exception and the further lines of its message
        end += 1
        while end < len(lines) and lines[end].startswith((" ", "\t")):
            end += 1
    while starts and start >= 2 and lines[start - 2].endswith(("exception occurred:", "following exception:")):
        start = starts.pop()
    return list(lines[start:end])
