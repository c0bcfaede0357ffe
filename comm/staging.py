"""Device memory and host memory: copies through pinned memory, in chunks, and host transports for device tensors.

Owns no transport of its own. A device without pinned memory is copied from pageable memory, and `describe` says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .transport import InHalves, Waits


@functools.cache
def can_pin(device_type: str) -> bool:
    """Whether host memory can be pinned for copies to and from this kind of device."""
    if device_type == "cpu":
        return False
    try:
        return torch.empty(16, dtype=torch.uint8, pin_memory=True).is_pinned()
    except (RuntimeError, NotImplementedError):
        return False


def describe(device: torch.device) -> str:
    kind = "pinned" if can_pin(device.type) else "pageable (slower: this torch cannot pin memory for the device)"
    return f"between {device.type} and the bridge: {kind} host memory, in chunks"


def host_chunks(payload: torch.Tensor, chunk_bytes: int) -> Iterator[torch.Tensor]:
    """`payload` (uint8 1-D, any device) as host tensors of at most `chunk_bytes`; one empty chunk for no bytes.

    Chunks of host memory are views. From a device, the next chunk's copy is under way while the caller has this one,
    and every chunk is memory of its own, which the caller may keep.
    """
    starts = range(0, max(len(payload), 1), chunk_bytes)
    parts = [payload[start : start + chunk_bytes] for start in starts]
    if payload.device.type == "cpu":
        yield from parts
        return
    pending = _copy_out(parts[0])
    for number in range(len(parts)):
        chunk, done = pending
        if number + 1 < len(parts):
            pending = _copy_out(parts[number + 1])
        done()
        yield chunk


def _copy_out(part: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
    """Begin a copy to the host; the second value waits for it."""
    if not can_pin(part.device.type):
        return part.cpu(), lambda: None
    chunk = torch.empty(len(part), dtype=torch.uint8, pin_memory=True)  # from torch's cache of pinned memory
    chunk.copy_(part, non_blocking=True)
    event = torch.Event(part.device)
    event.record()
    return chunk, event.synchronize


def copy_in(chunk: torch.Tensor, place: torch.Tensor) -> None:
    """Copy a host chunk (uint8 1-D) to `place` on any device; from pinned memory, so that the next can arrive."""
    if can_pin(place.device.type):
        pinned = torch.empty(len(chunk), dtype=torch.uint8, pin_memory=True)
        pinned.copy_(chunk)
        place.copy_(pinned, non_blocking=True)  # later work of this rank is on the same stream, after the copy
    else:
        place.copy_(chunk)


class StagedTransport(InHalves):
    """A host transport (gloo, shm, MPI) for device tensors: whole copies to host memory and back around each call."""

    def __init__(self, host: Any) -> None:
        self._host = host
        self.rank, self.size, self.deadline_s = host.rank, host.size, host.deadline_s
        self.name = f"{host.name}, device tensors staged through host memory"

    @property
    def waits(self) -> Waits:
        return self._host.waits

    def start_all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> Callable[[], torch.Tensor]:
        finish = self._host.start_all_to_all_v(send.cpu(), send_counts, recv_counts, phase)
        return lambda: finish().to(send.device)

    def all_reduce(self, tensor: torch.Tensor, phase: str, op: str = "sum") -> None:
        with _on_host(tensor) as value:
            self._host.all_reduce(value, phase, op)

    def all_gather(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        return self._host.all_gather(tensor.cpu(), phase).to(tensor.device)

    def broadcast(self, tensor: torch.Tensor, root: int, phase: str) -> None:
        with _on_host(tensor) as value:
            self._host.broadcast(value, root, phase)

    def send(self, tensor: torch.Tensor, to: int, phase: str) -> None:
        self._host.send(tensor.cpu(), to, phase)

    def recv(self, tensor: torch.Tensor, source: int, phase: str) -> None:
        with _on_host(tensor) as value:
            self._host.recv(value, source, phase)

    def barrier(self, phase: str) -> None:
        self._host.barrier(phase)

    def close(self) -> None:
        self._host.close()

    def describe(self) -> list[str]:
        return self._host.describe()


@contextmanager
def _on_host(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor's value in host memory, copied back when the block ends; the tensor itself where it is there."""
    value = tensor.detach().cpu()
    yield value
    if tensor.device.type != "cpu":
        tensor.detach().copy_(value)
