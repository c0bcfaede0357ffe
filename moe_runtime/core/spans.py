"""Named spans of time: how long dispatch, experts, combine and attention take, forward and backward, on this rank.

Off unless someone asks; then each span is counted here and is an event of torch's profiler, if that runs. A span within
one of the same name is part of it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_NOTHING = nullcontext()


class Spans:
    """`with spans("dispatch"):`, or begin and end where a span has no block. seconds: by name, since take()."""

    def __init__(self) -> None:
        self.on = False
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: dict[str, list[Any]] = {}  # name -> [depth, began, event of the profiler]

    def __call__(self, name: str) -> AbstractContextManager[Any]:
        return _Span(self, name) if self.on else _NOTHING

    def begin(self, name: str) -> None:
        if name in self._open:
            self._open[name][0] += 1
            return
        event = torch.profiler.record_function(name)
        event.__enter__()
        self._open[name] = [1, time.perf_counter(), event]

    def end(self, name: str) -> None:
        """Ends what was begun; nothing where nothing was."""
        entry = self._open.get(name)
        if entry is None:
            return
        entry[0] -= 1
        if not entry[0]:
            del self._open[name]
            entry[2].__exit__(None, None, None)
            self.seconds[name] += time.perf_counter() - entry[1]

    def around_backward(self, name: str, output: Any, given: Any) -> None:
        """The span of the backward pass of what made `output` of `given`, where both have one."""
        if not self.on or not (isinstance(output, torch.Tensor) and output.requires_grad):
            return
        if isinstance(given, torch.Tensor) and given.requires_grad:
            # Functions without a value: what a hook returns would replace the gradient.
            output.register_hook(lambda gradient: self.begin(name))
            given.register_hook(lambda gradient: self.end(name))

    def take(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


class _Span:
    def __init__(self, spans: Spans, name: str) -> None:
        self._spans, self._name = spans, name

    def __enter__(self) -> None:
        self._spans.begin(self._name)

    def __exit__(self, *_: object) -> None:
        self._spans.end(self._name)


spans = Spans()  # of this process
