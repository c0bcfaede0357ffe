"""Ranks as threads of one process: for tests, notebooks and simulations of a world. No bytes leave the process.

Ranks meet, read each other's tensors, and meet again before anyone may change them. An exchange that was started moves
nothing before it is finished, or before the next meeting. Owns no device, no socket and no memory beyond what it
returns.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch

from ..core.errors import ConfigError, MoeRuntimeError, PeerLost, PeerTimeout
from .transport import InHalves, Waits, check_counts, check_peer, describe_counts, once, reduce_in_rank_order


class ThreadWorld:
    """A world of `size` threads. `transport(rank)` belongs to one thread; `run` starts the threads as well."""

    def __init__(self, size: int, deadline_s: float = 300.0) -> None:
        if size < 1:
            raise ConfigError(f"a world needs at least one rank, got {size}")
        self.size, self.deadline_s = size, deadline_s
        self.changed = threading.Condition()
        # All below is guarded by `changed`. Meetings are numbered, so a late reader is never overtaken by a reset.
        self.arrived = [0] * size  # the last meeting each rank has come to
        self.posted: list[Any] = [None] * size  # what each rank brought to it
        self.gone: list[str | None] = [None] * size  # why a rank left, None while it is here
        self.mail: dict[tuple[int, int], deque[torch.Tensor]] = {}  # (from, to) -> tensors sent and not yet received

    def transport(self, rank: int) -> ThreadTransport:
        return ThreadTransport(self, rank)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(transport, *args)` on every rank and return the results by rank.

        A rank that raises leaves the world, so that the others get PeerLost; the first failure is raised here.
        """
        results: list[Any] = [None] * self.size
        failures: list[BaseException] = []

        def main(rank: int) -> None:
            transport = self.transport(rank)
            try:
                results[rank] = function(transport, *args)
            except BaseException as error:  # noqa: BLE001 - carried to the caller's thread
                failures.append(error)
                self.leave(rank, f"failed with {type(error).__name__}: {error}")
            finally:
                transport.close()

        threads = [threading.Thread(target=main, args=(rank,), name=f"rank {rank}") for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return results

    def leave(self, rank: int, why: str) -> None:
        with self.changed:
            if self.gone[rank] is None:
                self.gone[rank] = why
            self.changed.notify_all()


class _Posted(NamedTuple):
    """What a rank brought to a meeting, and when."""

    call: str
    phase: str
    value: Any
    at_s: float


class ThreadTransport(InHalves):
    """One rank of a ThreadWorld. Results do not share memory with what other ranks hold."""

    name = "threads"

    def __init__(self, world: ThreadWorld, rank: int) -> None:
        if not 0 <= rank < world.size:
            raise ConfigError(f"rank {rank} is not in 0..{world.size - 1}")
        self._world, self.rank, self.size, self.deadline_s = world, rank, world.size, world.deadline_s
        self.waits = Waits(world.size)
        self._started: deque[Callable[[], None]] = deque()  # exchanges not yet done, in the order of their start
        self._meeting = 0
        self._closed = False

    def start_all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> Callable[[], torch.Tensor]:
        check_counts(self, send, send_counts, recv_counts, phase)
        self._check_open(phase)
        recv = send.new_empty((sum(recv_counts), *send.shape[1:]))
        counts, parts, done = list(send_counts), recv.split(list(recv_counts)), False

        def move() -> None:
            nonlocal done
            self._move_rows(send.detach(), counts, parts, phase)
            done = True

        def finish() -> torch.Tensor:
            while move in self._started:
                self._started.popleft()()
            if not done:
                raise RuntimeError(f"{phase}: this exchange failed in an earlier call")
            return recv

        self._started.append(move)
        return once(finish, phase)

    def _move_rows(self, send: torch.Tensor, send_counts: list[int], parts: Sequence[torch.Tensor], phase: str) -> None:
        detail = describe_counts(send_counts, [len(part) for part in parts])
        with self._meet_now("all_to_all_v", (send, send_counts), phase, detail) as posted:
            for source, part in enumerate(parts):
                rows, counts = posted[source].value
                first = sum(counts[: self.rank])
                if (counts[self.rank], rows.dtype, rows.shape[1:]) != (len(part), send.dtype, send.shape[1:]):
                    raise MoeRuntimeError(
                        f"rank {self.rank}, phase {phase}: rank {source} sends {counts[self.rank]} rows of "
                        f"{tuple(rows.shape[1:])} {rows.dtype}, this rank expects {len(part)} of "
                        f"{tuple(send.shape[1:])} {send.dtype}"
                    )
                part.copy_(rows[first : first + len(part)])
            mine = posted[self.rank].at_s
            for peer in range(self.size):
                if peer != self.rank:
                    self.waits.add(peer, max(0.0, posted[peer].at_s - mine))

    def all_reduce(self, tensor: torch.Tensor, phase: str, op: str = "sum") -> None:
        with self._meet(f"all_reduce {op} of {tuple(tensor.shape)} {tensor.dtype}", tensor.detach(), phase) as posted:
            total = reduce_in_rank_order([each.value for each in posted], op)
        tensor.detach().copy_(total)

    def all_gather(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        with self._meet(f"all_gather of {tuple(tensor.shape)} {tensor.dtype}", tensor.detach(), phase) as posted:
            return torch.stack([each.value for each in posted])

    def broadcast(self, tensor: torch.Tensor, root: int, phase: str) -> None:
        with self._meet(f"broadcast of {tuple(tensor.shape)} from rank {root}", tensor.detach(), phase) as posted:
            if self.rank != root:
                tensor.detach().copy_(posted[root].value)

    def send(self, tensor: torch.Tensor, to: int, phase: str) -> None:
        self._check_open(phase)
        check_peer(self, to, phase)
        with self._world.changed:
            if (why := self._world.gone[to]) is not None:
                raise PeerLost(f"rank {self.rank}, phase {phase}: rank {to} {why}", rank=to, phase=phase)
            self._world.mail.setdefault((self.rank, to), deque()).append(tensor.detach().clone())
            self._world.changed.notify_all()

    def recv(self, tensor: torch.Tensor, source: int, phase: str) -> None:
        self._check_open(phase)
        check_peer(self, source, phase)
        with self._world.changed:
            box = self._world.mail.setdefault((source, self.rank), deque())
            self._wait(lambda: [] if box else [source], phase, f"for {tuple(tensor.shape)} from rank {source}")
            sent = box.popleft()
        if sent.numel() * sent.element_size() != tensor.numel() * tensor.element_size():
            raise MoeRuntimeError(
                f"rank {self.rank}, phase {phase}: rank {source} sent {tuple(sent.shape)} {sent.dtype}, this rank "
                f"expects {tuple(tensor.shape)} {tensor.dtype}"
            )
        tensor.detach().copy_(sent.view(tensor.dtype).view(tensor.shape))

    def barrier(self, phase: str) -> None:
        with self._meet("barrier", None, phase):
            pass

    def close(self) -> None:
        self._closed = True
        self._world.leave(self.rank, "closed its transport")

    def _meet(self, call: str, value: Any, phase: str) -> AbstractContextManager[list[_Posted]]:
        """A meeting, after those of the exchanges started before: so all ranks come to the same ones."""
        while self._started:
            self._started.popleft()()
        return self._meet_now(call, value, phase)

    @contextmanager
    def _meet_now(self, call: str, value: Any, phase: str, detail: str = "") -> Iterator[list[_Posted]]:
        """What every rank brought to this call, readable until the block ends; ends when all ranks have read."""
        self._check_open(phase)
        world = self._world
        with world.changed:
            world.posted[self.rank] = _Posted(call, phase, value, time.monotonic())
            self._arrive()
            self._wait(self._missing, phase, detail)
            posted = list(world.posted)
        try:
            self._check_same_call(call, phase, posted)
            yield posted
        finally:  # also after an error of this rank's own: the others are done with it in this call
            with world.changed:
                self._arrive()
        with world.changed:
            self._wait(self._missing, phase, detail)
            world.posted[self.rank] = None  # all have read it: do not keep it alive

    def _arrive(self) -> None:
        self._meeting += 1
        self._world.arrived[self.rank] = self._meeting
        self._world.changed.notify_all()

    def _missing(self) -> list[int]:
        return [rank for rank, meeting in enumerate(self._world.arrived) if meeting < self._meeting]

    def _wait(self, missing: Callable[[], list[int]], phase: str, detail: str) -> None:
        """Until `missing()` is empty; the caller holds the lock."""
        world, until = self._world, time.monotonic() + self.deadline_s
        where = f"rank {self.rank}, phase {phase}" + (f", {detail}" if detail else "")
        while ranks := missing():
            for rank in ranks:
                if (why := world.gone[rank]) is not None:
                    raise PeerLost(f"{where}: rank {rank} {why}", rank=rank, phase=phase)
            left = until - time.monotonic()
            if left <= 0:
                raise PeerTimeout(
                    f"{where}: waited {self.deadline_s:g} s for ranks {ranks} over {self.name}; they are stuck or "
                    "in a different call (raise timeout_s if they are only slow)",
                    waiting_rank=self.rank,
                    ranks=tuple(ranks),
                    phase=phase,
                )
            world.changed.wait(left)

    def _check_same_call(self, call: str, phase: str, posted: list[_Posted]) -> None:
        for rank, other in enumerate(posted):
            if other.call != call:
                raise MoeRuntimeError(
                    f"rank {self.rank} is in {call} (phase {phase}), rank {rank} in {other.call} "
                    f"(phase {other.phase}): all ranks must make the same calls in the same order"
                )

    def _check_open(self, phase: str) -> None:
        if self._closed:
            raise RuntimeError(f"{phase}: the transport is closed")
