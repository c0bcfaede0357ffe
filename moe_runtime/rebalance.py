"""Live rebalancing of one model: a migration is taken one step on before every forward pass, and from time to time a
policy looks whether another placement would pay.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .comm.transport import Transport
from .comm.wire import all_gather_message, first_problem
from .core.errors import ConfigError
from .core.placement import Placement
from .experts.placement.files import plan_from_dict, plan_to_dict
from .migration import Migration, columns_of, gradient_columns

_NOTES = 5  # failures that describe() remembers


@dataclass(frozen=True)
class Look:
    """What a policy is shown. load [L, E]: tokens of all ranks since the last look. cost [R]: measured seconds per
    token (of an expert layer's row), from the cluster file's speeds where a rank computed nothing or its time cannot
    be seen. expert_bytes [L]. bytes_per_s: of earlier migrations, an assumption before the first."""

    number: int
    passes: int
    placement: Placement
    load: np.ndarray
    cost: np.ndarray
    expert_bytes: list[int]
    bytes_per_s: float


# A Placement to move to, or None to stay. Asked on rank 0 only; its attribute `decision`, if any, is shown to people.
Policy = Callable[[Look], Placement | None]


class Rebalancer:
    """Of one model. `switched(old)` is called when a new placement is in force, `speeds()` gives the cluster file's."""

    def __init__(
        self,
        transport: Transport,
        layers: Sequence[Any],
        slice_bytes: int,
        stall_s: float,
        speeds: Sequence[float],
        switched: Callable[[Placement, Placement], None],
    ) -> None:
        self.transport, self.layers = transport, layers
        self.slice_bytes, self.stall_s, self.speeds, self._switched = slice_bytes, stall_s, list(speeds), switched
        self.migration: Migration | None = None
        self.optimizer: torch.optim.Optimizer | None = None  # whose state travels along, while training
        self.policy: Policy | None = None
        self.every = 0
        self.switches, self.rolled_back, self.bytes_moved, self.stall_seconds = 0, 0, 0, 0.0
        self.notes: list[str] = []
        self.decision = ""
        self._looks, self._bytes_per_s = 0, 0.0
        self._seconds = np.zeros(len(layers))
        self._tokens = [np.zeros(0)] * len(layers)
        self._passes_at_look = self.passes
        self._watchdog: _Watchdog | None = None

    @property
    def passes(self) -> int:
        return self.layers[0].moe_runtime_layer.passes

    @property
    def placement(self) -> Placement:
        return self.layers[0].moe_runtime_layer.placement

    def before_exchange(self, layer: int) -> None:
        """Called by each expert layer; all ranks are at the same one.

        Serving takes a step per pass, or a look where one is due. Training takes a step at every layer, since all must
        have travelled before the optimizer's next one.
        """
        migration = self.migration
        if migration is None:
            if layer == 0 and self._is_due() and not self.layers[0].training:
                self._look()
        elif self.optimizer is not None:
            self._travel(migration)
        elif layer == 0 and self._travel(migration):
            self._conclude(migration)

    def between_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """A look where one is due, after an optimizer step. Every rank calls."""
        if self.migration is None and self._is_due():
            self._look(optimizer)

    def _is_due(self) -> bool:
        return self.policy is not None and self.passes - self._passes_at_look >= self.every

    def begin(self, new: Placement, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Begin to move. Every rank calls at the same pass. Raises ConfigError, on all ranks, for what cannot be."""
        problem = self._check(new, optimizer)
        migration: Migration | None = None
        if not problem:
            try:
                columns = [columns_of(layer, optimizer) for layer in self.layers]
                migration = Migration(self.transport, self.layers, new, columns, self.slice_bytes)
            except ConfigError as error:
                problem = str(error)
        said = all_gather_message(
            self.transport,
            [problem, [["passes", self.passes], *(migration.signature() if migration else [])]],
            "rebalance",
        )
        for rank, (told, _) in enumerate(said):
            if told:
                raise ConfigError(told if rank == self.transport.rank else f"rank {rank}: {told}")
        for rank, (_, signature) in enumerate(said):
            for (word, theirs), (_, first) in zip(signature, said[0][1], strict=True):
                if theirs != first:
                    raise ConfigError(
                        f"rebalance: rank {rank} disagrees with rank 0 on {word}: {theirs} against {first}; call it "
                        "on all ranks with the same arguments, between the same forward passes"
                    )
        assert migration is not None  # its problem would have been raised above
        told = self._set_aside(migration)
        if told:
            self._roll_back(told)
            return
        self.migration, self.optimizer = migration, optimizer
        self._watchdog = _Watchdog(migration, self.stall_s)

    def _set_aside(self, migration: Migration) -> str:
        """Memory for what will come; what any rank lacks, on every rank."""
        failed = ""
        try:
            with torch.inference_mode(False), torch.no_grad():  # memory that outlives this mode
                migration.set_aside()
        except (MemoryError, RuntimeError) as error:  # RuntimeError is torch's word for it
            failed = f"rank {self.transport.rank} has no memory for it ({str(error).splitlines()[0]})"
        return first_problem(self.transport, failed, "rebalance (memory)")

    def follow(self, transport: Transport, speeds: Sequence[float]) -> None:
        """A new view is in force: what was under way is not, and looks begin anew, on all ranks alike."""
        self._end()
        self.transport, self.speeds, self._passes_at_look = transport, list(speeds), self.passes

    def finish(self) -> None:
        """Do the rest of a migration at once. Every rank calls; while training, before the optimizer's step."""
        migration = self.migration
        if migration is None:
            return
        while not self._travel(migration):
            pass
        self._conclude(migration)

    def _check(self, new: Placement, optimizer: torch.optim.Optimizer | None) -> str:
        old = self.placement
        trains = self.layers[0].training and any(p.requires_grad for layer in self.layers for p in layer.parameters())
        if trains and optimizer is None:
            return "rebalance: a model in training needs optimizer=, or model.eval() first"
        if self.migration is not None:
            return "rebalance: another one is under way; finish it first"
        held = self.layers[0].moe_runtime_layer.expert_dtypes
        if len(set(held)) > 1:
            ranks = ", ".join(f"rank {rank} {name}" for rank, name in enumerate(held))
            return f"rebalance: ranks hold their experts in different dtypes ({ranks}); load all in one to move them"
        for word in ("num_layers", "num_experts", "num_ranks"):
            if getattr(new, word) != getattr(old, word):
                return f"rebalance: the placement has {word} = {getattr(new, word)}, the model {getattr(old, word)}"
        if old.absent is not None and (new.absent is None or (old.absent & ~new.absent).any()):
            return f"rebalance: {old.say_absent()}: it cannot travel, and must be read again (refit.py)"
        return ""

    def _travel(self, migration: Migration) -> bool:
        """One step; whether all have come."""
        try:
            if not migration.moved:
                migration.step()
        except BaseException:
            self._end()  # a rank is lost, or late: the old placement stays in force
            raise
        return migration.moved

    def _conclude(self, migration: Migration) -> None:
        """All have come: check, move the gradients after them where there are any, and switch; or roll back."""
        began = time.perf_counter()
        moved, problem = [migration], ""
        try:
            problem = migration.problem()
            if self.optimizer is not None and not problem:
                gradients = gradient_columns(self.layers, self.transport)
                moved.append(Migration(self.transport, self.layers, migration.new, gradients, self.slice_bytes))
                problem = self._set_aside(moved[-1])
                while not problem and not moved[-1].moved:
                    moved[-1].step()
                problem = problem or moved[-1].problem()
        finally:
            self._end()
        self._bytes_per_s = migration.bytes_sent / migration.seconds if migration.seconds > 0 else 0.0
        if problem:
            self._roll_back(problem)
            return
        for layer in self.layers:
            layer.moe_runtime_layer.fold_tokens(self.transport.rank)
        for each in moved:
            each.switch()
            self.bytes_moved += sum(move.num_bytes for move in each.moves)
        self._switched(migration.old, migration.new)
        self.switches += 1
        self.stall_seconds += migration.seconds + time.perf_counter() - began

    def _end(self) -> None:
        self.migration, self.optimizer = None, None
        if self._watchdog is not None:
            self._watchdog.stop()

    def _roll_back(self, why: str) -> None:
        self.rolled_back += 1
        note = f"rebalance rolled back at pass {self.passes}, the old placement stays in force: {why}"
        self.notes = [*self.notes, note][-_NOTES:]
        if self.transport.rank == 0:
            print(f"moe-runtime: {note}", file=sys.stderr, flush=True)

    # ---- looking ------------------------------------------------------------------------------------------------

    def _look(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Rank 0 is shown what all ranks have measured and asks the policy; all begin what it answers."""
        passes = self.passes - self._passes_at_look
        self._passes_at_look = self.passes
        look = self._measure(passes)
        answer: Any = None
        if self.transport.rank == 0:
            try:
                wanted = self.policy(look)
                answer = [None if wanted is None else plan_to_dict(wanted), getattr(self.policy, "decision", "")]
            except ConfigError as error:  # no plan is no reason to end the job
                answer = [None, f"the policy could not plan: {error}"]
        found, self.decision = all_gather_message(self.transport, answer, "rebalance (decision)")[0]
        if found is not None:
            self.begin(plan_from_dict(found, "the policy's placement"), optimizer)

    def _measure(self, passes: int) -> Look:
        placement, rank = self.placement, self.transport.rank
        load = torch.zeros(placement.num_layers, placement.num_experts, dtype=torch.int64)
        seconds, rows = 0.0, 0
        for layer, module in enumerate(self.layers):
            state = module.moe_runtime_layer
            tokens = state.tokens_per_expert(rank)
            before = self._tokens[layer] if len(self._tokens[layer]) else 0
            # A reset in between (runtime.load) leaves less than there was.
            load[layer] = torch.from_numpy(np.where(tokens >= before, tokens - before, tokens))
            self._tokens[layer] = tokens
            seconds += state.expert_seconds - self._seconds[layer]
            self._seconds[layer] = state.expert_seconds
            rows += int(load[layer].sum())
        on_cpu = self.layers[0].moe_runtime_layer.dispatcher.device.type == "cpu"
        told = all_gather_message(
            self.transport, [seconds if on_cpu else 0.0, rows, self._bytes_per_s], "rebalance (speeds)"
        )
        self.transport.all_reduce(load, "rebalance (load)")
        self._looks += 1
        bytes_per_s = min((rate for _, _, rate in told if rate > 0), default=1e9)
        expert_bytes = [sum(column.row_bytes for column in columns_of(layer, None)) for layer in self.layers]
        cost = seconds_per_token([(seconds, rows) for seconds, rows, _ in told], self.speeds)
        return Look(self._looks, passes, placement, load.numpy(), cost, expert_bytes, bytes_per_s)

    def describe(self) -> list[str]:
        lines = []
        if self.switches or self.rolled_back or self.policy or self.migration:
            lines.append(
                f"rebalancing: {self.switches} switches, {self.bytes_moved / 2**20:.1f} MiB moved, passes held up for "
                f"{self.stall_seconds:.3f} s, {self.rolled_back} rolled back"
                + (f"; looks every {self.every} passes" if self.policy else "")
            )
        if self.decision:
            lines.append(f"rebalancing, last look: {self.decision}")
        if self.migration is not None:
            progress = self.migration.progress
            came = f"{progress.done} of {progress.slices} slices have come"
            lines.append(f"rebalancing: {came}; waiting for {progress.waiting_for}")
        return lines + [f"note: {note}" for note in self.notes]


def seconds_per_token(measured: Sequence[tuple[float, int]], speeds: Sequence[float]) -> np.ndarray:
    """[R], from each rank's (seconds, tokens); a rank without either is taken to be as fast as the cluster file says
    beside those that were measured."""
    known = {rank: seconds / rows for rank, (seconds, rows) in enumerate(measured) if seconds > 0 and rows > 0}
    unit = float(np.median([cost * speeds[rank] for rank, cost in known.items()])) if known else 1.0
    return np.array([known.get(rank, unit / speed) for rank, speed in enumerate(speeds)])


class _Watchdog:
    """Says on stderr, once per stall, that a migration has made no progress for `stall_s` seconds, and who waits."""

    def __init__(self, migration: Migration, stall_s: float) -> None:
        self._migration, self._stall_s = migration, stall_s
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="rebalance-watchdog", daemon=True).start()

    def _watch(self) -> None:
        told_of = 0.0
        while not self._ended.wait(min(1.0, self._stall_s / 4)):
            progress = self._migration.progress
            stalled = time.monotonic() - progress.changed_at
            if stalled > self._stall_s and progress.changed_at != told_of:
                told_of = progress.changed_at
                print(
                    f"moe-runtime: rank {self._migration.transport.rank}: rebalance has not moved for {stalled:.0f} s, "
                    f"{progress.done} of {progress.slices} slices have come; waiting for {progress.waiting_for}; "
                    "the old placement is in force",
                    file=sys.stderr,
                    flush=True,
                )

    def stop(self) -> None:
        self._ended.set()
