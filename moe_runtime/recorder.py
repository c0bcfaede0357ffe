"""Recording what tokens select: load and routing traces of a running model, for planning placements.

Each forward pass adds this rank's counts to memory that was set aside; ranks talk only when the recording ends. What
does not fit is not dropped: of a long recording, neighbouring passes share a row.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .comm.transport import Transport
from .comm.wire import all_gather_message
from .core.errors import MoeRuntimeError
from .experts import traces
from .layer import ExpertParallel, experts_modules

LOAD_MIB, ROUTING_MIB = 256, 1024


class Recorder:
    """Counts what the tokens of a model's expert layers select, until `stop` writes it. Made by `runtime.record`.

    path: of the load trace, `load [passes, L, E]` of all ranks together. With `routing`, of the routing trace,
    `topk_ids [T, L, K]` of all ranks' tokens by pass, then rank. `note` says what was left out or put together.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        transport: Transport,
        path: str | Path,
        routing: bool = False,
        limit_mib: int | None = None,
    ) -> None:
        self.path, self.note = Path(path), ""
        self._transport, self._routing = transport, routing
        named = {name: m for name, m in experts_modules(model).items() if isinstance(m, ExpertParallel)}
        self._layers = list(named.values())
        self._numbers = layer_numbers(list(named))
        self._kind = getattr(getattr(model, "config", None), "model_type", "unknown")
        self._num_experts = self._layers[0].moe_runtime_layer.placement.num_experts
        limit = (limit_mib or (ROUTING_MIB if routing else LOAD_MIB)) << 20
        row_bytes = 4 * len(self._layers) * self._num_experts
        # An even number of rows, so that they can be put together two by two. Untouched memory is not there yet.
        self._load = np.zeros((max(2, (limit // row_bytes) & ~1), len(self._layers), self._num_experts), np.int32)
        self._passes, self._per_row = 0, 1
        self._ids: list[list[np.ndarray]] = []
        self._room = limit if routing else 0
        self._is_open = True
        for layer in self._layers:
            layer.moe_runtime_layer.recorder = self

    def add(self, layer: int, topk_ids_TK: torch.Tensor) -> None:
        """What this rank's tokens select in one layer of this pass; ids that are known to be good."""
        if layer == 0:
            self._next_pass()
        if not self._passes:
            return  # recording began in the middle of a pass
        ids = topk_ids_TK.to("cpu", torch.int64).numpy()
        if ids.size:
            counts = np.bincount(ids.reshape(-1) + 1, minlength=self._num_experts + 1)[1:]  # -1 selects nothing
            self._load[(self._passes - 1) // self._per_row, layer] += counts.astype(np.int32)
        if self._routing and self._room > 0:
            kept = ids.astype(np.int16 if self._num_experts < 1 << 15 else np.int32)
            self._room -= kept.nbytes
            if layer == 0:
                self._ids.append([])
            if len(self._ids) == self._passes:
                self._ids[-1].append(kept)

    def _next_pass(self) -> None:
        if self._passes == len(self._load) * self._per_row:
            half = len(self._load) // 2
            self._load[:half] = self._load[0::2] + self._load[1::2]
            self._load[half:] = 0
            self._per_row *= 2
        self._passes += 1

    def stop(self) -> Path:
        """Write the trace; rank 0 does. Every rank calls. Raises MoeRuntimeError when their passes differ."""
        if not self._is_open:
            return self.path
        self.detach()
        whole = [ids for ids in self._ids if len(ids) == len(self._layers)]
        said = all_gather_message(self._transport, [self._passes, self._per_row, len(whole)], "recording")
        for rank, (passes, per_row, _) in enumerate(said):
            if [passes, per_row] != [self._passes, self._per_row]:
                raise MoeRuntimeError(
                    f"recording: rank {rank} saw {passes} passes, rank {self._transport.rank} {self._passes}; "
                    "begin and end it on all ranks between the same passes"
                )
        if self._routing:
            self._write_routing(whole[: min(count for _, _, count in said)])
        else:
            self._write_load()
        if self.note and self._transport.rank == 0:
            print(f"recording {self.path}: {self.note}", file=sys.stderr)
        return self.path

    def detach(self) -> None:
        """End the recording without writing anything."""
        self._is_open = False
        for layer in self._layers:
            if layer.moe_runtime_layer.recorder is self:
                layer.moe_runtime_layer.recorder = None

    def _write_load(self) -> None:
        load = torch.from_numpy(self._load[: -(-self._passes // self._per_row)].astype(np.int64))
        self._transport.all_reduce(load, "recording")
        rows = load.numpy()
        rows = rows[rows.any(axis=(1, 2))]  # the pass in which ranks find out that all are done has no tokens
        if self._per_row > 1:
            self.note = f"{self._per_row} passes in each row"
        self._write(lambda: traces.LoadTrace(rows, self._numbers, self._metadata()), len(rows))

    def _write_routing(self, passes: list[list[np.ndarray]]) -> None:
        """Rank 0 takes every rank's ids and sorts them by pass, then rank."""
        transport = self._transport
        if len(passes) < self._passes:
            self.note = f"the first {len(passes)} of {self._passes} passes; the routing of more would not fit"
        top_k = self._layers[0].moe_runtime_layer.dispatcher.top_k
        mine = [np.stack(ids, axis=1).astype(np.int32) for ids in passes]  # [T, L, K] of each pass
        tokens = all_gather_message(transport, [len(ids) for ids in mine], "recording (tokens)")
        packed = torch.from_numpy(np.concatenate([*mine, np.empty((0, len(self._layers), top_k), np.int32)]))
        if transport.rank:
            if len(packed):
                transport.send(packed, 0, "recording")
            return
        of_rank = [mine]
        for rank in range(1, transport.size):
            received = torch.empty(sum(tokens[rank]), *packed.shape[1:], dtype=torch.int32)
            if len(received):
                transport.recv(received, rank, "recording")
            of_rank.append(np.split(received.numpy(), np.cumsum(tokens[rank])[:-1]))
        ids = np.concatenate([part for parts in zip(*of_rank, strict=True) for part in parts] or [packed.numpy()])
        self._write(lambda: traces.RoutingTrace(ids, self._num_experts, self._numbers, self._metadata()), len(ids))

    def _write(self, make: Callable[[], traces.LoadTrace | traces.RoutingTrace], rows: int) -> None:
        if self._transport.rank:
            return
        if rows:
            traces.save(make(), self.path)
        else:
            self.note = "no token was seen; nothing is written"

    def _metadata(self) -> dict:
        return {
            "source": "moe-runtime",
            "model_type": self._kind,
            "ranks": self._transport.size,
            "passes": self._passes,
            "passes_per_row": self._per_row,
        }

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.stop()
        else:
            self.detach()  # other ranks may not be there to write it with


def layer_numbers(names: list[str]) -> tuple[int, ...] | None:
    """The layers of the model that modules of these names are in, where the names say so."""
    found = [re.search(r"\blayers\.(\d+)\.", name) for name in names]
    numbers = [int(match[1]) for match in found if match]
    return tuple(numbers) if len(numbers) == len(names) and numbers == sorted(set(numbers)) else None
