"""The runtime's own transport with tensors on this rank's device: every dtype must come through bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...comm.quirks import dtype_name
from ...core.errors import PeerLost, PeerTimeout, VendorUnavailable
from .collectives import reduced
from .context import Context, first_difference, same_bits, sample
from .device import first_line
from .verdicts import REFUSED, SKIPPED, WORKS, WRONG, Outcome

# What gradients, counts and flags are reduced in.
REDUCED = tuple(getattr(torch, name) for name in "float32 bfloat16 float16 float64 int64 int32 uint8 int8 bool".split())

Pairs = Iterator[tuple[str, torch.Tensor, torch.Tensor]]  # (what it is, what came, what was expected)
Exchange = Callable[[Context, torch.dtype], Pairs]


def for_every_dtype(exchange: Exchange, only: tuple[torch.dtype, ...] | None = None) -> Callable[[Context], Outcome]:
    """The probe that runs `exchange` for each dtype that every rank's device holds."""

    def run(context: Context) -> Outcome:
        if context.runtime.size == 1:
            return Outcome(SKIPPED, "it takes two ranks")
        passed, wrong, refused, documented = [], [], [], []
        for dtype in context.dtypes if only is None else [d for d in only if d in context.dtypes]:
            name = dtype_name(dtype)
            try:
                for what, got, expected in exchange(context, dtype):
                    if not same_bits(got.cpu(), expected):
                        wrong.append(f"{name} {what}: {first_difference(got.cpu(), expected)}")
                        break
                else:
                    passed.append(name)
            except VendorUnavailable:  # by the vendor table, on all ranks alike, before anything was sent
                documented.append(name)
            except (PeerLost, PeerTimeout):
                raise
            except Exception as error:  # noqa: BLE001 - whatever a library raises is what is reported
                refused.append(f"{name}: {first_line(error)}")
        seen = f"{len(passed)} dtypes bit for bit"
        seen += f"; by the vendor table not reduced: {', '.join(documented)}" if documented else ""
        for said, problems in (("wrong values", wrong), ("refused", refused)):
            seen += f"; {said}: {'; '.join(problems)}" if problems else ""
        return Outcome(WRONG if wrong else REFUSED if refused or not passed else WORKS, seen)

    return run


# Rows from a rank to another: some ranks get nothing, or nothing from some.
PATTERNS: dict[str, Callable[[int, int, int], int]] = {
    "uneven": lambda source, to, size: (3 * source + 2 * to + 1) % 5,
    "rank 0 sends nothing, the last gets nothing": lambda source, to, size: 0 if not source or to == size - 1 else 3,
    "all to rank 0": lambda source, to, size: 0 if to else 4 + source,
    "nothing at all": lambda source, to, size: 0,
}
_WIDTH = 3  # elements of a row: an odd number


def all_to_all(context: Context, dtype: torch.dtype) -> Pairs:
    transport, begun = context.runtime.transport, []
    rank, size = transport.rank, transport.size
    for name, count in PATTERNS.items():
        sending = [count(rank, peer, size) for peer in range(size)]
        coming = [count(peer, rank, size) for peer in range(size)]
        rows = torch.cat([_rows(dtype, rank, to, number, size) for to, number in enumerate(sending)])
        expected = torch.cat([_rows(dtype, source, rank, number, size) for source, number in enumerate(coming)])
        begun.append((name, expected, transport.start_all_to_all_v(rows.to(context.device), sending, coming, "check")))
    for name, expected, finish in begun:  # all were under way at once
        yield name, finish(), expected


def _rows(dtype: torch.dtype, source: int, to: int, number: int, size: int) -> torch.Tensor:
    return sample(dtype, number * _WIDTH, 1 + source * size + to).view(number, _WIDTH)


def all_gather(context: Context, dtype: torch.dtype) -> Pairs:
    transport = context.runtime.transport
    parts = [sample(dtype, 7, 1 + rank) for rank in range(transport.size)]
    yield "gathered", transport.all_gather(parts[transport.rank].to(context.device), "check"), torch.stack(parts)


def broadcast(context: Context, dtype: torch.dtype) -> Pairs:
    transport = context.runtime.transport
    for root in range(transport.size):
        tensor = sample(dtype, 7, 1 + transport.rank).to(context.device)
        transport.broadcast(tensor, root, "check")
        yield f"from rank {root}", tensor, sample(dtype, 7, 1 + root)


def send_and_receive(context: Context, dtype: torch.dtype) -> Pairs:
    transport = context.runtime.transport
    to, source = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    sent = sample(dtype, 7, 1 + transport.rank).to(context.device)
    received = torch.zeros_like(sent)
    calls = [lambda: transport.send(sent, to, "check"), lambda: transport.recv(received, source, "check")]
    for call in calls if transport.rank % 2 == 0 else calls[::-1]:
        call()
    yield f"from rank {source}", received, sample(dtype, 7, 1 + source)


def all_reduce(context: Context, dtype: torch.dtype) -> Pairs:
    transport = context.runtime.transport
    parts = [sample(dtype, 7, 1 + rank, transport.size) for rank in range(transport.size)]
    for operation in ("sum", "max", "min") if dtype != torch.bool else ("sum",):
        tensor = parts[transport.rank].to(context.device, copy=True)
        transport.all_reduce(tensor, "check", operation)
        yield operation, tensor, reduced(parts, operation)


def barrier(context: Context) -> Outcome:
    context.runtime.transport.barrier("check")
    return Outcome(WORKS, "works")
