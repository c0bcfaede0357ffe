"""The vendor's collective library itself, straight on torch.distributed and without the runtime's transport.

Each probe has a group of its own, so that one which spoils its communicator does not spoil the next.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ...comm.quirks import dtype_name
from ...comm.transport import deadline
from .context import DTYPES, Context, compare, sample
from .device import first_line
from .verdicts import SKIPPED, WORKS, Outcome

NO_GROUP = "no group"  # a result that agrees with no claim: the probe's call was never made
_CHUNK = 1024  # elements: of any dtype a multiple of 512 bytes


@dataclass(frozen=True)
class Fresh:
    """A group of its own over this rank's island."""

    group: Any
    rank: int
    size: int
    context: Context

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, on a CPU too: what a library writes must not be in what is expected."""
        return tensor.to(self.context.device, copy=True)


Body = Callable[[Fresh], Outcome]


def on_fresh_group(body: Body, alone: bool = True) -> Callable[[Context], Outcome]:
    """The probe that runs `body` on a group of its own. alone: whether one rank is enough for it."""

    def run(context: Context) -> Outcome:
        if dist.get_world_size() == 1 and not alone:
            return Outcome(SKIPPED, "it takes two ranks of this vendor")
        _retire(context)
        problem = ""
        try:
            context.group = dist.new_group(backend=context.place.backend, timeout=deadline(context.deadline_s))
        except (RuntimeError, ValueError, OSError) as error:
            problem = first_line(error)
        # Over gloo: a rank whose library refuses at once must not be gone while others still make the group.
        made = torch.tensor([not problem], dtype=torch.int32)
        dist.all_reduce(made, dist.ReduceOp.MIN)
        if not made:
            return Outcome(NO_GROUP, f"no group was made ({problem or 'on another rank'})")
        group, context.group_ended = context.group, False
        outcome = body(Fresh(group, dist.get_rank(group), dist.get_world_size(group), context))
        context.synchronize()
        context.group_ended = True
        return outcome

    return run


def _retire(context: Context) -> None:
    """Take down the group of the probe before, which every rank has left by now."""
    group, context.group = context.group, None
    # A vendor's communicator that refused a call may hang when it is taken down; it ends with the process.
    if group is not None and (context.group_ended or not context.on_chip):
        dist.destroy_process_group(group)


def holding(dtype: torch.dtype, body: Body) -> Body:
    """`body`, where every rank's device holds the dtype: otherwise it is not the library that would refuse."""

    def run(fresh: Fresh) -> Outcome:
        if dtype not in fresh.context.dtypes:
            return Outcome(SKIPPED, f"not every rank's device holds {dtype_name(dtype)}")
        return body(fresh)

    return run


# ---------------------------------------------------------------- all-to-all


def exchange(dtype: torch.dtype, chunk: int = _CHUNK, stride: int = 1) -> Body:
    """all_to_all_single, even: `chunk` elements to each rank."""

    def run(fresh: Fresh) -> Outcome:
        ranks = range(fresh.size)
        sent = torch.cat([_part(dtype, chunk, fresh.rank, peer, fresh.size) for peer in ranks])
        expected = torch.cat([_part(dtype, chunk, source, fresh.rank, fresh.size) for source in ranks])
        given, received = (_strided(fresh.to_device(tensor), stride) for tensor in (sent, torch.zeros_like(expected)))
        dist.all_to_all_single(received, given, group=fresh.group)
        return compare([("received", received.contiguous(), expected)])

    return run


def exchange_uneven(count: Callable[[int, int], int]) -> Body:
    """all_to_all_single, float32; count(source, destination) is in chunks of 512 elements."""

    def run(fresh: Fresh) -> Outcome:
        ranks, dtype = range(fresh.size), torch.float32
        sending = [512 * count(fresh.rank, peer) for peer in ranks]
        coming = [512 * count(source, fresh.rank) for source in ranks]
        sent = torch.cat([_part(dtype, size, fresh.rank, to, fresh.size) for to, size in enumerate(sending)])
        expected = torch.cat([_part(dtype, size, source, fresh.rank, fresh.size) for source, size in enumerate(coming)])
        received = fresh.to_device(torch.zeros_like(expected))
        dist.all_to_all_single(received, fresh.to_device(sent), coming, sending, group=fresh.group)
        return compare([(f"with {coming} elements expected", received, expected)])

    return run


def _part(dtype: torch.dtype, count: int, source: int, to: int, size: int) -> torch.Tensor:
    return sample(dtype, count, source * size + to + 1, size)


def _strided(tensor: torch.Tensor, stride: int) -> torch.Tensor:
    """The same values, every `stride`-th element of a larger tensor."""
    if stride == 1:
        return tensor
    wide = tensor.new_zeros((len(tensor), stride))
    wide[:, 0] = tensor
    return wide[:, 0]


# ---------------------------------------------------------------- reductions


def reduce(dtype: torch.dtype, *operations: str, stride: int = 1) -> Body:
    """all_reduce by each of the operations ("sum", "max", "min", "avg")."""

    def run(fresh: Fresh) -> Outcome:
        parts = [sample(dtype, _CHUNK, 1 + rank, fresh.size) for rank in range(fresh.size)]
        pairs = []
        for name in operations:
            mine = _strided(fresh.to_device(parts[fresh.rank]), stride)
            dist.all_reduce(mine, getattr(dist.ReduceOp, name.upper()), group=fresh.group)
            got, expected = mine.contiguous().cpu(), reduced(parts, name)
            if name == "avg":  # a library may divide, or multiply with a rounded reciprocal
                got = torch.where(torch.isclose(got, expected, rtol=1e-6), expected, got)
            pairs.append((f"of {name}", got, expected))
        return compare(pairs)

    return run


def reduced(parts: Sequence[torch.Tensor], operation: str) -> torch.Tensor:
    """What a reduction must give: exact in a wider type, then in the parts' own."""
    dtype = parts[0].dtype
    if dtype == torch.bool:
        return torch.stack(list(parts)).any(0)
    wide = torch.stack([part.double() if dtype.is_floating_point else part.to(torch.int64) for part in parts])
    total = wide.amax(0) if operation == "max" else wide.amin(0) if operation == "min" else wide.sum(0)
    return (total / len(parts) if operation == "avg" else total).to(dtype)


def reduce_operations(dtype: torch.dtype) -> tuple[str, ...]:
    """A re-signed type sums alike and compares otherwise."""
    return ("sum",) if dtype == torch.bool else ("sum", "max")


# ---------------------------------------------------------------- the others


def all_gather(fresh: Fresh) -> Outcome:
    parts = [sample(torch.float32, _CHUNK, 1 + rank) for rank in range(fresh.size)]
    received = [fresh.to_device(torch.zeros(_CHUNK)) for _ in parts]
    dist.all_gather(received, fresh.to_device(parts[fresh.rank]), group=fresh.group)
    return compare([(f"of rank {rank}", got, parts[rank]) for rank, got in enumerate(received)])


def broadcast(fresh: Fresh) -> Outcome:
    root = fresh.size - 1
    tensor = fresh.to_device(sample(torch.float32, _CHUNK, 1 + fresh.rank))
    dist.broadcast(tensor, group_src=root, group=fresh.group)
    return compare([(f"of rank {root}", tensor, sample(torch.float32, _CHUNK, 1 + root))])


def barrier(fresh: Fresh) -> Outcome:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "barrier")  # torch takes the current device, and says so
        dist.barrier(group=fresh.group)
    return Outcome(WORKS, "works")


def send_and_receive(fresh: Fresh) -> Outcome:
    """Round the ring. Even ranks send first: calls may block, and on one stream they run in order."""
    to, source = (fresh.rank + 1) % fresh.size, (fresh.rank - 1) % fresh.size
    sent = fresh.to_device(sample(torch.float32, _CHUNK, 1 + fresh.rank))
    received = torch.zeros_like(sent)
    calls = [
        lambda: dist.send(sent, group_dst=to, group=fresh.group),
        lambda: dist.recv(received, group_src=source, group=fresh.group),
    ]
    for call in calls if fresh.rank % 2 == 0 else calls[::-1]:
        call()
    return compare([(f"from rank {source}", received, sample(torch.float32, _CHUNK, 1 + source))])


def batch(fresh: Fresh) -> Outcome:
    """batch_isend_irecv round the ring."""
    to, source = (fresh.rank + 1) % fresh.size, (fresh.rank - 1) % fresh.size
    sent = fresh.to_device(sample(torch.float32, _CHUNK, 1 + fresh.rank))
    received = torch.zeros_like(sent)
    operations = [
        dist.P2POp(dist.isend, sent, group=fresh.group, group_peer=to),
        dist.P2POp(dist.irecv, received, group=fresh.group, group_peer=source),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return compare([(f"from rank {source}", received, sample(torch.float32, _CHUNK, 1 + source))])


def gather(fresh: Fresh) -> Outcome:
    parts = [sample(torch.float32, _CHUNK, 1 + rank) for rank in range(fresh.size)]
    received = [fresh.to_device(torch.zeros(_CHUNK)) for _ in parts] if fresh.rank == 0 else None
    dist.gather(fresh.to_device(parts[fresh.rank]), received, group_dst=0, group=fresh.group)
    return compare([(f"of rank {rank}", got, parts[rank]) for rank, got in enumerate(received or ())])


def receive_from_any(fresh: Fresh) -> Outcome:
    """Every rank receives before it sends, so that a library without it refuses on all ranks alike."""
    to, source = (fresh.rank + 1) % fresh.size, (fresh.rank - 1) % fresh.size
    received = fresh.to_device(torch.zeros(_CHUNK))
    receiving = dist.irecv(received, group=fresh.group)
    dist.send(fresh.to_device(sample(torch.float32, _CHUNK, 1 + fresh.rank)), group_dst=to, group=fresh.group)
    assert receiving is not None  # only ranks outside the group get None
    receiving.wait()
    return compare([(f"from rank {source}", received, sample(torch.float32, _CHUNK, 1 + source))])


def moving() -> list[tuple[torch.dtype, Callable[[Context], Outcome]]]:
    return [(dtype, on_fresh_group(holding(dtype, exchange(dtype)))) for dtype in DTYPES]


def reducing() -> list[tuple[torch.dtype, Callable[[Context], Outcome]]]:
    return [(dtype, on_fresh_group(holding(dtype, reduce(dtype, *reduce_operations(dtype))))) for dtype in DTYPES]
