"""Ends every process of this user that carries a job's mark in its environment. Runs alone, without the package.

Process groups do not do for this: engines give each rank a session of its own, and ranks start what they like. The
mark is inherited by all of them. As a program it waits until its stdin ends (whoever holds the other end has died,
be it by SIGKILL) and then sweeps: `python -I -S sweep.py MARK`.
"""

import os
import signal
import sys
import time


def marked(mark: str) -> list[int]:
    """The processes whose environment has `mark` (NAME=value), this one left out."""
    found = []
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    if mark.encode() in file.read().split(b"\0"):
                        found.append(int(entry))
            except OSError:  # it has ended, or is another user's
                continue
    return found


def sweep(mark: str, seconds: float = 5.0) -> int:
    """SIGKILL to all of them until none is left or the time is over; how many there were at first."""
    ends = time.monotonic() + seconds
    found = first = marked(mark)
    while found and time.monotonic() < ends:
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
            except OSError:
                pass
        time.sleep(0.05)
        found = marked(mark)
    return len(first)


if __name__ == "__main__":
    sys.stdin.read()
    sweep(sys.argv[1])
