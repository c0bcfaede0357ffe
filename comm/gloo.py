"""Ranks over torch.distributed's gloo, host tensors: pairs of sends and receives, so that an error names its rank.

gloo's own all-to-all is made of the same messages and is faster for tiny ones (docs/transports.md), but reports the
address of a lost peer and not its rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..core.errors import PeerLost, PeerTimeout
from .pairwise import PairwiseTransport
from .quirks import as_bytes
from .transport import Waits, check_peer, deadline

_PAIR_TAGS, _TAGS = 1 << 29, (1 << 29) - 1  # send and recv have tags of their own, numbered by pair


class GlooTransport(PairwiseTransport):
    """A Transport over a gloo group; CPU tensors. `owns_default_group`: close() ends torch.distributed as a whole."""

    def __init__(self, group: Any, deadline_s: float, owns_default_group: bool) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group), deadline_s)
        self.name = "torch.distributed:gloo"
        self._group, self._owns_default_group = group, owns_default_group
        self._operation = 0
        self._pair_operations: dict[tuple[int, int], int] = {}

    def start(
        self,
        outgoing: Mapping[int, torch.Tensor],
        incoming: Mapping[int, torch.Tensor],
        phase: str,
        detail: str = "",
        waits: Waits | None = None,
    ) -> Callable[[], None]:
        self._operation += 1
        tag = self._operation & _TAGS
        receives = [(peer, self._post("recv", incoming[peer], peer, tag, phase, detail)) for peer in sorted(incoming)]
        # Each rank starts with its right-hand neighbour, to spread the load.
        order = sorted(outgoing, key=lambda peer: (peer - self.rank) % self.size)
        sends = [(peer, self._post("send", outgoing[peer], peer, tag, phase, detail)) for peer in order]

        def finish() -> None:
            ends = time.monotonic() + self.deadline_s
            for peer, work in receives:
                began = time.monotonic()
                self._wait(work, peer, ends, phase, detail)
                if waits is not None:
                    waits.add(peer, time.monotonic() - began)
            for peer, work in sends:
                self._wait(work, peer, ends, phase, detail)

        return finish

    def send(self, tensor: torch.Tensor, to: int, phase: str) -> None:
        check_peer(self, to, phase)
        work = self._post("send", tensor.detach().contiguous(), to, self._pair_tag(self.rank, to), phase, "")
        self._wait(work, to, time.monotonic() + self.deadline_s, phase, f"for rank {to}")

    def recv(self, tensor: torch.Tensor, source: int, phase: str) -> None:
        check_peer(self, source, phase)
        work = self._post("recv", tensor.detach(), source, self._pair_tag(source, self.rank), phase, "")
        self._wait(work, source, time.monotonic() + self.deadline_s, phase, f"from rank {source}")

    def close(self) -> None:
        # Let go of the group as well: gloo's worker threads end with its last reference, and one that is still about
        # when the interpreter shuts down aborts the process (seen: one generation in ten).
        group, self._group = self._group, None
        if group is None or not dist.is_initialized():
            return
        dist.destroy_process_group(None if self._owns_default_group else group)

    def _pair_tag(self, source: int, to: int) -> int:
        count = self._pair_operations[source, to] = self._pair_operations.get((source, to), 0) + 1
        return _PAIR_TAGS | (count & _TAGS)

    def _post(self, way: str, tensor: torch.Tensor, peer: int, tag: int, phase: str, detail: str) -> Any:
        if self._group is None:
            raise RuntimeError(f"{phase}: the transport is closed")
        try:
            data = as_bytes(tensor).view(-1)
            if way == "send":
                return dist.isend(data, group_dst=peer, group=self._group, tag=tag)
            return dist.irecv(data, group_src=peer, group=self._group, tag=tag)
        except RuntimeError as error:
            raise translate(error, self, phase, detail, (peer,)) from error

    def _wait(self, work: Any, peer: int, ends: float, phase: str, detail: str) -> None:
        try:
            work.wait(deadline(max(ends - time.monotonic(), 0.001)))
        except RuntimeError as error:
            raise translate(error, self, phase, detail, (peer,)) from error


def translate(error: RuntimeError, transport: Any, phase: str, detail: str, waits_for: tuple[int, ...]) -> Exception:
    """Turn torch.distributed's RuntimeErrors into PeerTimeout and PeerLost; leave others as they are.

    waits_for: the ranks that the failed call needed. A library that reports no rank may have needed all of them.
    """
    text = str(error)
    where = f"rank {transport.rank}, phase {phase}" + (f", {detail}" if detail else "")
    if "imed out" in text or "imeout" in text:
        return PeerTimeout(
            f"{where}: waited {transport.deadline_s:g} s for ranks {list(waits_for)} over {transport.name}; "
            "one of them is stuck, stopped or in a different call (raise timeout_s if it is only slow)",
            waiting_rank=transport.rank,
            ranks=waits_for,
            phase=phase,
        )
    if any(mark in text for mark in ("onnection closed", "onnection reset", "roken pipe", "ead error", "rite error")):
        lost = waits_for[0] if len(waits_for) == 1 else None
        named = f"rank {lost}" if lost is not None else f"one of ranks {list(waits_for)}"
        return PeerLost(
            f"{where}: {named} closed its connection ({transport.name}); look at its log", rank=lost, phase=phase
        )
    return error
