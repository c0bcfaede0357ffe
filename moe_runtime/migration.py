"""One change of placement: experts' bytes travel in slices, are checked, and take their new slots all at once.

Slices go between the exchanges of forward passes, into memory set aside for them; the old placement serves meanwhile.
When all have come, every moved expert's checksum is compared with its source's and the ranks agree; then `switch` puts
the rows where the new placement has them, or nothing has changed.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .comm.quirks import as_bytes
from .comm.transport import Transport
from .comm.wire import all_gather_message, first_problem
from .core.errors import ConfigError
from .core.memory import pool
from .core.placement import Placement
from .gradients import gradient_of
from .moves import Chunk, cut_slices, kept_slots, list_moves, order_in_place

UNIT = 16  # bytes; what is sent is padded to whole units


@dataclass
class Column:
    """One tensor of a layer with an entry per local slot: a parameter, its gradient, or a part of optimizer state."""

    name: str
    get: Callable[[], torch.Tensor]
    put: Callable[[torch.Tensor], None]

    @property
    def row_bytes(self) -> int:
        return as_bytes(self.get()[:1]).shape[1]


def columns_of(layer: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> list[Column]:
    """Weights, and with an optimizer its state. Raises ConfigError for state that cannot be cut by expert."""
    columns = []
    for name, parameter in sorted(layer.named_parameters(recurse=False)):
        columns.append(_weight(layer, name, optimizer))
        if optimizer is None:
            continue
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                continue  # a count of steps, the same on every rank
            if value.shape != parameter.shape:
                raise ConfigError(
                    f"rebalance: the optimizer's {key!r} for {name} has shape {list(value.shape)}, not one entry per "
                    "expert; use an optimizer whose state has the parameter's shape (Adam, SGD, ...)"
                )
            columns.append(_state(layer, name, optimizer, key))
    return columns


def gradient_columns(layers: Sequence[torch.nn.Module], transport: Transport) -> list[list[Column]]:
    """The gradients of each layer's weights that any rank has; zeros where this one has none. Every rank calls."""
    parameters = [(layer, sorted(layer.named_parameters(recurse=False))) for layer in layers]
    mine = [[parameter.grad is not None for _, parameter in named] for _, named in parameters]
    said = all_gather_message(transport, mine, "rebalance (gradients)")
    columns: list[list[Column]] = []
    for index, (layer, named) in enumerate(parameters):
        columns.append([])
        for at, (name, parameter) in enumerate(named):
            if any(flags[index][at] for flags in said):
                if parameter.grad is None:
                    parameter.grad = gradient_of(parameter)
                columns[-1].append(_gradient(layer, name))
    return columns


def _weight(layer: torch.nn.Module, name: str, optimizer: torch.optim.Optimizer | None) -> Column:
    def put(value: torch.Tensor) -> None:
        # A parameter cannot change its shape while a graph of an earlier step lives: a new one takes its place.
        old = getattr(layer, name)
        with torch.inference_mode(False):
            new = torch.nn.Parameter(value, requires_grad=old.requires_grad)
            if old.dtype != getattr(old, "grad_dtype", old.dtype):
                new.grad_dtype = old.grad_dtype
        setattr(layer, name, new)
        for group in optimizer.param_groups if optimizer else ():
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        if optimizer and old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)

    return Column(name, lambda: getattr(layer, name).data, put)


def _gradient(layer: torch.nn.Module, name: str) -> Column:
    gradient = getattr(layer, name).grad
    return Column(f"{name}.grad", lambda: gradient, lambda value: setattr(getattr(layer, name), "grad", value))


def _state(layer: torch.nn.Module, name: str, optimizer: torch.optim.Optimizer, key: str) -> Column:
    def state() -> dict:
        return optimizer.state[getattr(layer, name)]

    return Column(f"{name}.{key}", lambda: state()[key], lambda value: state().__setitem__(key, value))


@dataclass
class Progress:
    """What a watchdog, and people, are told of a migration under way."""

    slices: int = 0
    done: int = 0
    waiting_for: str = "the next forward pass"
    changed_at: float = field(default_factory=time.monotonic)

    def now(self, waiting_for: str, done: int | None = None) -> None:
        self.waiting_for, self.changed_at = waiting_for, time.monotonic()
        self.done = self.done if done is None else done


class Migration:
    """Each layer's columns from one placement to another. Every rank makes it alike, and steps alike until `moved`."""

    def __init__(
        self,
        transport: Transport,
        layers: Sequence[Any],
        new: Placement,
        columns: list[list[Column]],
        slice_bytes: int,
    ) -> None:
        self.transport, self.layers, self.new = transport, layers, new
        self.old: Placement = layers[0].moe_runtime_layer.placement
        self.columns = columns
        self.expert_bytes = [sum(column.row_bytes for column in columns) for columns in self.columns]
        self.moves = list_moves(self.old, new, self.expert_bytes)
        self.slices = cut_slices(self.moves, max(UNIT, slice_bytes // UNIT * UNIT))
        self.progress = Progress(len(self.slices))
        self.bytes_sent, self.seconds = 0, 0.0  # this rank's; seconds that passes were held up
        self._versions = self._weight_versions()
        self._staging: dict[int, torch.Tensor] = {}
        self._fresh: dict[tuple[int, int], torch.Tensor] = {}
        self._crc: dict[int, int] = {}  # of what this rank has sent, by move
        self._arrived_crc: dict[int, int] = {}
        self._arrive: Callable[[], torch.Tensor] | None = None

    def set_aside(self) -> None:
        """Take the memory that this rank needs. Raises what the allocator raises."""
        rank, device = self.transport.rank, next(self.layers[0].parameters()).device
        mine = [number for number, move in enumerate(self.moves) if move.destination == rank]
        sizes = [_padded(self.moves[number].num_bytes) for number in mine]
        rows = _bytes(sum(sizes), device).split(sizes)
        self._staging = {n: row[: self.moves[n].num_bytes] for n, row in zip(mine, rows, strict=True)}
        most = max((self._size(chunks, "source") for chunks in self.slices), default=0)
        self._send = _bytes(most, device)  # used again for every slice
        for index, columns in enumerate(self.columns):
            count = len(self.new.rank_experts(index, rank))
            for at, column in enumerate(columns):
                tensor = column.get()
                if len(tensor) != count:
                    self._fresh[index, at] = tensor.new_empty((count, *tensor.shape[1:]))

    @property
    def moved(self) -> bool:
        return self._arrive is None and self.progress.done == len(self.slices)

    def step(self) -> None:
        """Take in the slice that is under way, if there is one, and send the next one on its way."""
        began = time.perf_counter()
        if self._arrive is not None:
            self._take_in()
        if self.progress.done < len(self.slices):
            self._start()
        self.seconds += time.perf_counter() - began

    def _start(self) -> None:
        chunks, rank = self.slices[self.progress.done], self.transport.rank
        mine = [chunk for chunk in chunks if self.moves[chunk.move].source == rank]
        send, at = self._send[: self._size(chunks, "source")], 0
        for chunk in mine:
            size = chunk.end - chunk.begin
            self._gather(chunk, send[at : at + size])
            self._crc[chunk.move] = _crc(send[at : at + size], self._crc.get(chunk.move, 0))
            self.bytes_sent += size
            at += _padded(size)
        phase = f"rebalance (slice {self.progress.done + 1} of {len(self.slices)})"
        self._arrive = self.transport.start_all_to_all_v(
            send.view(-1, UNIT), self._counts(mine, "destination"), self._counts(self._coming(), "source"), phase
        )

    def _take_in(self) -> None:
        coming = self._coming()
        sources = sorted({self.moves[chunk.move].source for chunk in coming})
        first = f" ({self.moves[coming[0].move]})" if coming else ""
        self.progress.now(f"rank {self.transport.rank} waits for ranks {sources or 'all'}{first}")
        received = self._arrive().view(-1)
        at = 0
        for chunk in coming:
            size = chunk.end - chunk.begin
            rows = self._staging[chunk.move]
            rows[chunk.begin : chunk.end].copy_(received[at : at + size])
            if chunk.end == len(rows):  # all of this expert is there
                self._arrived_crc[chunk.move] = _crc(rows)
            at += _padded(size)
        self._arrive = None
        self.progress.now("the next forward pass", self.progress.done + 1)

    def _coming(self) -> list[Chunk]:
        chunks = self.slices[self.progress.done]
        return [chunk for chunk in chunks if self.moves[chunk.move].destination == self.transport.rank]

    def _counts(self, chunks: list[Chunk], end: str) -> list[int]:
        counts = [0] * self.transport.size
        for chunk in chunks:
            counts[getattr(self.moves[chunk.move], end)] += _padded(chunk.end - chunk.begin) // UNIT
        return counts

    def _size(self, chunks: list[Chunk], end: str) -> int:
        """Bytes, padding included, of the chunks whose source or destination is this rank."""
        mine = (chunk for chunk in chunks if getattr(self.moves[chunk.move], end) == self.transport.rank)
        return sum(_padded(chunk.end - chunk.begin) for chunk in mine)

    def _gather(self, chunk: Chunk, out: torch.Tensor) -> None:
        """A chunk's bytes from the rows of its expert: one column's row after the other."""
        move, at = self.moves[chunk.move], 0
        slot = self.old.rank_experts(move.layer, move.source).index(move.expert)
        for column in self.columns[move.layer]:
            row = as_bytes(column.get()[slot : slot + 1])[0]
            begin, end = max(chunk.begin, at), min(chunk.end, at + len(row))
            if begin < end:
                out[begin - chunk.begin : end - chunk.begin].copy_(row[begin - at : end - at])
            at += len(row)

    def problem(self) -> str:
        """What is wrong with what came to any rank, or "": the same on every rank. Every rank calls."""
        self.progress.now(f"rank {self.transport.rank} waits for all ranks' checksums")
        mine = sorted(self._crc.items())
        changed = self._weight_versions() != self._versions
        said = all_gather_message(self.transport, [mine, changed], "rebalance (checksums)")
        expected = {number: crc for checksums, _ in said for number, crc in checksums}
        wrong = next((n for n in sorted(self._staging) if self._arrived_crc.get(n) != expected.get(n)), None)
        found = "" if wrong is None else f"the checksum of {self.moves[wrong]} differs"
        if any(changed for _, changed in said):
            rank = [changed for _, changed in said].index(True)
            found = f"rank {rank}'s weights changed meanwhile; in training give optimizer="
        return first_problem(self.transport, found, "rebalance (outcome)")

    def _weight_versions(self) -> list[int]:
        """torch's counts of writes to the weights; tensors made in inference mode have none."""
        parameters = [p for layer in self.layers for p in layer.parameters(recurse=False)]
        return [0 if p.is_inference() else p._version for p in parameters]

    def switch(self) -> None:
        """Put every layer's rows in their new slots. Nothing here allocates, waits or can fail."""
        rank = self.transport.rank
        arrived = {(self.moves[n].layer, self.moves[n].expert): rows for n, rows in self._staging.items()}
        for index, columns in enumerate(self.columns):
            kept = kept_slots(self.old, self.new, index, rank)
            experts, offset = self.new.rank_experts(index, rank), 0
            in_place = order_in_place(kept)
            for at, column in enumerate(columns):
                before, after, width = column.get(), self._fresh.pop((index, at), None), column.row_bytes
                with torch.no_grad():
                    if after is None:
                        after = before
                        for source, target in in_place:
                            after[target].copy_(before[source])
                    else:
                        for target, source in enumerate(kept.tolist()):
                            if source >= 0:
                                after[target].copy_(before[source])
                    for slot in np.flatnonzero(kept < 0).tolist():
                        row = arrived[index, experts[slot]][offset : offset + width]
                        as_bytes(after[slot : slot + 1])[0].copy_(row)
                if after is not before:
                    column.put(after)
                offset += width
        self._staging.clear()

    def signature(self) -> list[Any]:
        """What must be equal on all ranks, with the word for it."""
        named = [[column.name, list(column.get().shape[1:]), str(column.get().dtype)] for column in self.columns[0]]
        return [["placement", self.new.digest()], ["placement in force", self.old.digest()], ["tensors", named]]


def _bytes(count: int, device: torch.device) -> torch.Tensor:
    return (
        pool.empty((count,), torch.uint8)
        if device.type == "cpu"
        else torch.empty(count, dtype=torch.uint8, device=device)
    )


def _padded(size: int) -> int:
    return -(-size // UNIT) * UNIT


def _crc(rows: torch.Tensor, start: int = 0) -> int:
    return zlib.crc32(rows.cpu().numpy(), start)
