"""A call of the emulated library under way, and device tensors as gloo takes them.

Owns no limits and no counts; see collectives.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..quirks import as_bytes


class EmulatedWork(dist.Work):
    """A call under way. As on a stream, its results are there once it was waited for."""

    def __init__(self, work: dist.Work, results: list[torch.Tensor], finish: Callable[[], None]) -> None:
        super().__init__()
        self._work, self._results, self._finish = work, results, finish
        self._finished = False

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._work.wait(timeout) if timeout else self._work.wait()
        if not self._finished:
            self._finished = True
            self._finish()
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._work.is_completed()

    def is_success(self) -> bool:
        return self._work.is_success()

    def exception(self) -> Any:
        return self._work.exception()

    def result(self) -> list[torch.Tensor]:
        return self._results

    def source_rank(self) -> int:
        return self._work._source_rank()

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future:
        self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self._results)
        return future


class HostMemory:
    """A device tensor as gloo takes it: its own memory as bytes [N, bytes per row], a contiguous copy if it is strided.

    whole: in its own dtype and shape, for reductions.
    """

    def __init__(self, tensor: torch.Tensor, whole: bool = False) -> None:
        self.tensor = tensor
        view = torch.ops.moe_emulated.host_view(tensor.detach())
        self._strided = None if view.is_contiguous() else view
        self._packed = view.contiguous()
        self.data = self._packed if whole else as_bytes(self._packed)

    def give_back(self) -> None:
        """Bring what gloo wrote into a copy to the device; a contiguous tensor has it already."""
        if self._strided is not None:
            self._strided.copy_(self._packed)


def on_host(tensors: Sequence[torch.Tensor]) -> list[HostMemory]:
    return [HostMemory(tensor) for tensor in tensors]


def data_of(hosts: Sequence[HostMemory]) -> list[torch.Tensor]:
    return [host.data for host in hosts]
