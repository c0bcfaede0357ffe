"""Two passes of one rank by turns: while the rows of one travel, the other computes. One of them runs at any time.

Each runs in a thread until it would wait for rows (`pass_turn`); then the other goes on from where it waits. So the
order of exchanges follows from the passes alone and is the same on every rank, as exchanges need it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_here = threading.local()  # of this thread: .seat, (turns, number) while it has one; .states of its latest exchange


class Ended(BaseException):
    """The other pass has failed: this one is not to go on. BaseException, so that nothing on the way takes it."""


def pass_turn() -> None:
    """Let the other pass run until it would wait; nothing where there is none. Called before waiting for rows."""
    seat = getattr(_here, "seat", None)
    if seat is not None:
        seat[0].pass_on(seat[1])


def note_states(states: list[int]) -> None:
    """What all ranks said in the exchange that this thread has just had."""
    _here.states = states


def states_here() -> list[int]:
    """What all ranks said in this thread's latest exchange."""
    return _here.states


class _Turns:
    """Whose turn it is. Waits here are as long as what the other does, whose own waits have deadlines."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn, self._left, self._failed = 0, [False, False], False

    def begin(self, number: int) -> None:
        with self._changed:
            self._wait_for(number)

    def pass_on(self, number: int) -> None:
        with self._changed:
            if not self._left[1 - number]:
                self._turn = 1 - number
                self._changed.notify_all()
                self._wait_for(number)
            if self._failed:
                raise Ended

    def leave(self, number: int, failed: bool) -> None:
        with self._changed:
            self._left[number], self._failed, self._turn = True, self._failed or failed, 1 - number
            self._changed.notify_all()

    def _wait_for(self, number: int) -> None:
        self._changed.wait_for(lambda: self._turn == number or self._left[1 - number])


class ByTurns:
    """Runs pairs of functions by turns, the first in the calling thread; the second's thread lives until `close`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="second-half")

    def run(self, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
        """What both return. The first error of either is raised, and the other then goes no further."""
        turns, mode = _Turns(), (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        errors: list[BaseException] = []

        def sit(number: int, work: Callable[[], Any]) -> Any:
            turns.begin(number)
            _here.seat, failed = (turns, number), True
            try:
                with torch.inference_mode(mode[0]), torch.set_grad_enabled(mode[1]):  # a thread has its own
                    result = work()
                failed = False
                return result
            except Ended:
                return None
            except BaseException as error:  # noqa: BLE001 - run raises it in the calling thread
                errors.append(error)
                return None
            finally:
                _here.seat = None
                turns.leave(number, failed)

        other = self._pool.submit(sit, 1, second)
        results = sit(0, first), other.result()
        if errors:
            raise errors[0]
        return results

    def close(self) -> None:
        self._pool.shutdown()
