"""Memory for large results that is used again: a fresh page costs more than what is written to it.

The C library gives large blocks back to the kernel when they are freed, and every new one is faulted in and zeroed page
by page; on a virtual machine that takes several times as long as a copy of the same size. A block of the pool comes
back when the tensor that was made of it is gone, and goes to the next result of about its size.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

SMALL_BYTES = 1 << 20  # up to here the C library keeps freed memory itself
_STEP = 1 << 21  # a huge page: where the kernel has them, one fault instead of 512
_KEPT_FOR = 512  # a block that as many requests had no use for goes back to the kernel


@dataclass(slots=True, eq=False)
class _Block:
    memory: mmap.mmap
    idle_since: int = 0  # the number of the request after which it came back


class Pool:
    """Lends blocks of at most twice the size asked for (and 2 MiB); any thread may ask or let go."""

    def __init__(self) -> None:
        self._free: list[_Block] = []
        self._returned: deque[_Block] = deque()  # results end in any thread, at any moment
        self._lock = threading.Lock()
        self._requests = 0
        self._lent_bytes = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """torch.empty on the CPU, from the pool where it is large."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes <= SMALL_BYTES:
            return torch.empty(*shape, dtype=dtype)
        return torch.from_numpy(self.bytes(num_bytes)).view(dtype).view(*shape)

    def bytes(self, num_bytes: int) -> np.ndarray:
        """uint8 [num_bytes], not set; from the pool where it is large."""
        if num_bytes <= SMALL_BYTES:
            return np.empty(num_bytes, dtype=np.uint8)
        with self._lock:
            self._requests += 1
            self._collect()
            block = self._take(num_bytes)
            self._lent_bytes += len(block.memory)
        # Made from the block itself, so that this array is the base of all its views and outlives them.
        array = np.frombuffer(block.memory, np.uint8, num_bytes)
        weakref.finalize(array, self._returned.append, block).atexit = False
        return array

    def describe(self) -> str:
        with self._lock:
            self._collect()
            kept = sum(len(block.memory) for block in self._free)
            return f"large results: {self._lent_bytes / 2**20:.0f} MiB in use, {kept / 2**20:.0f} MiB kept for the next"

    def _take(self, num_bytes: int) -> _Block:
        fitting = [b for b in self._free if num_bytes <= len(b.memory) <= 2 * num_bytes + _STEP]
        if fitting:
            block = min(fitting, key=lambda b: len(b.memory))
            self._free.remove(block)
            return block
        # Private: a forked child keeps what it sees, and only private memory has huge pages everywhere.
        memory = mmap.mmap(-1, -(-num_bytes // _STEP) * _STEP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return _Block(memory)

    def _collect(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            block.idle_since = self._requests
            self._lent_bytes -= len(block.memory)
            self._free.append(block)
        self._free = [block for block in self._free if self._requests - block.idle_since <= _KEPT_FOR]


pool = Pool()
