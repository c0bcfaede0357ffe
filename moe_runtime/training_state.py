"""Checkpoints of a training: saved in the background, kept N, resumed on the same ranks to the bit, or on others.

Every rank calls alike. What is stored is state_tensors.py's, its form on disk state_files.py's; here is how the ranks
agree. The writing thread of a rank never talks to other ranks: they meet in the folder, which all hosts must share.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from . import state_files as files
from .comm.wire import all_gather_message
from .core.errors import CheckpointError, ConfigError, MoeRuntimeError, PeerTimeout
from .core.placement import Placement
from .model import expert_layers
from .runtime import Runtime
from .state_files import Manifest
from .state_tensors import Restore, copy_state

_TICK_S = 0.1  # ranks look this often whether the others have finished writing


class Checkpoints:
    """The training checkpoints of one run in `folder`, of which the newest `keep` stay.

    Raises ConfigError, on all ranks, for a `keep` below 1 and where torch has no safetensors storage.
    `failure` says why the save that ended last could not be written, "" if it could: the same on every rank.
    """

    def __init__(self, runtime: Runtime, folder: str | Path, keep: int = 3) -> None:
        self._runtime, self.folder, self._keep = runtime, Path(folder), keep
        self.failure = ""
        self._writing: _Writing | None = None
        self._damaged: set[int] = set()
        self._newest: Manifest | None = None
        self._looked = False
        with runtime.same_outcome("open the training checkpoints"):
            if keep < 1:
                raise ConfigError(f"keep must be at least 1 checkpoint, got {keep}")
            files.require_storage()

    def saved_placement(self) -> Placement | None:
        """The placement of the newest good checkpoint, if as many ranks wrote it as there are now: for create_model."""
        newest = self._find_newest()
        return newest.placement if newest is not None and newest.num_ranks == self._runtime.size else None

    def load(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Read the newest complete and undamaged checkpoint into both; None where the folder holds none.

        Returns what `save` was given as `extra`, with "step". The model must have its own placement already, the one
        it was saved with or another. On as many ranks as wrote it torch's random generators are set back as well.
        A damaged one is named on stderr and the one before is taken. Raises CheckpointError, on all ranks, where none
        is good, or where model or optimizer are others than those that were saved; nothing is changed then.
        """
        newest, runtime = self._find_newest(), self._runtime
        if newest is None:
            return None
        path = files.final_path(self.folder, newest.step)
        with runtime.same_outcome("find its part of the training checkpoint"):
            _check_same_kind(path, newest, model, optimizer)
            entries = files.list_tensors(path, range(newest.num_ranks))
            same_ranks = newest.num_ranks == runtime.size
            restore = Restore(model, optimizer, runtime.rank, runtime.size, entries, path, same_ranks)
        with runtime.same_outcome("read the training checkpoint"):
            files.read_tensors(path, restore.targets, entries)
            restore.finish()
        return {**newest.extra, "step": newest.step}

    def save(
        self, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, extra: dict[str, Any] | None = None
    ) -> None:
        """Copy the state after `step` steps to host memory, and write it while training goes on.

        Waits first for the save before, if that is still being written. extra: what JSON can hold. A checkpoint that
        cannot be written is reported on stderr and in `failure`; older ones stay. Raises ConfigError, on all ranks,
        for optimizer state or `extra` that cannot be stored.
        """
        self._wait()
        runtime, rank = self._runtime, self._runtime.rank
        partial, problem = files.partial_path(self.folder, step), ""
        with runtime.same_outcome("copy the training state"):
            tensors = copy_state(model, optimizer, rank, runtime.size)
            extra = _plain(extra or {})
        if rank == 0:
            problem = _trying(lambda: _prepare(self.folder, partial))
        told = all_gather_message(runtime.transport, [step, problem], "save of the training state (folder)")
        if any(theirs != step for theirs, _ in told):
            raise ConfigError(f"training state: ranks save different steps: {[theirs for theirs, _ in told]}")
        problem = told[0][1]
        if problem:
            self._conclude(step, problem)
            return
        placement = expert_layers(model)[0].moe_runtime_layer.placement
        manifest = Manifest(step, runtime.size, type(optimizer).__name__, extra, placement, {})
        self._damaged.discard(step)
        finish = _Publish(self.folder, manifest, self._keep, set(self._damaged), runtime.config.timeout_s)
        self._writing = _Writing(partial, rank, tensors, finish if rank == 0 else None)
        self._looked = False

    def close(self) -> None:
        """Wait until the last save is on disk. Raises CheckpointError, on all ranks, if it could not be written."""
        self._wait()
        if self.failure:
            raise CheckpointError(f"{self.failure}; older checkpoints in {self.folder} still stand")

    # ---- the ranks agree ----------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Until no rank is writing. Looks in ticks: a slow disk keeps nobody waiting in one exchange.

        A disk may be slow for all. Raises once the same ranks have kept others waiting for `timeout_s`, or twice that.
        """
        writing = self._writing
        if writing is None:
            return
        late: list[int] = []  # who keeps the others waiting
        since = time.monotonic()  # when it became them
        while True:
            busy = writing.is_busy(_TICK_S)
            mine = [busy, writing.failure, writing.in_part, time.monotonic() - since if late else 0.0]
            told = all_gather_message(self._runtime.transport, mine, "wait for the training state on disk")
            if not any(busy for busy, *_ in told):
                break
            writing.hear({rank: failure for rank, (busy, failure, *_) in enumerate(told) if failure and not busy})
            now_late, most = _keep_others_waiting([busy for busy, *_ in told], [in_part for _, _, in_part, _ in told])
            if now_late != late:
                late, since = now_late, time.monotonic()
            elif late and told[0][3] > most * self._runtime.config.timeout_s:  # rank 0's clock is everybody's
                raise self._late(late, writing.final, told[0][3])
        self._writing = None
        first = next((rank for rank, (_, failure, *_) in enumerate(told) if failure and rank), None)
        failure = told[0][1] or (f"rank {first}: {told[first][1]}" if first is not None else "")
        self.failure = f"{writing.final}: could not be written ({failure})" if failure else ""

    def _late(self, late: list[int], final: Path, waited_s: float) -> MoeRuntimeError:
        rank, phase = self._runtime.rank, "wait for the training state on disk"
        said = (
            f"rank {rank}, phase {phase}: waited {waited_s:.0f} s for ranks {late}, which still write {final} where "
            "others are done; is a disk stuck? (raise timeout_s if it is only slow)"
        )
        if rank in late:
            return MoeRuntimeError(said)
        return PeerTimeout(said, waiting_rank=rank, ranks=tuple(late), phase=phase)

    def _conclude(self, step: int, problem: str) -> None:
        final = files.final_path(self.folder, step)
        self.failure = f"{final}: could not be written ({problem})"
        if self._runtime.rank == 0:
            _report(final, 0, problem)

    def _find_newest(self) -> Manifest | None:
        """The newest checkpoint that is whole, on all ranks alike. Each rank checks its share of the files."""
        self._wait()
        if not self._looked:
            self._newest, self._looked = self._look(), True
        return self._newest

    def _look(self) -> Manifest | None:
        runtime = self._runtime
        steps: list[int] = []
        problem = ""
        if runtime.rank == 0:
            problem = _trying(lambda: steps.extend(_list(self.folder)))
        steps, problem = all_gather_message(runtime.transport, [steps, problem], "list of training checkpoints")[0]
        if problem:
            raise CheckpointError(f"{self.folder}: cannot be read ({problem})")
        for step in steps:
            path = files.final_path(self.folder, step)
            manifest, crc, problem = _check(path, runtime.rank, runtime.size)
            told = all_gather_message(runtime.transport, [problem, crc], "check of a training checkpoint")
            problem = next((f"rank {rank}: {said}" for rank, (said, _) in enumerate(told) if said), "")
            if not problem and any(crc != told[0][1] for _, crc in told):
                problem = "ranks read different manifests; every host must see the same folder"
            if not problem:
                return manifest
            self._damaged.add(step)
            if runtime.rank == 0:
                print(f"moe-runtime: {path} is damaged: {problem}; trying the one before", file=sys.stderr, flush=True)
        if steps:
            raise CheckpointError(
                f"{self.folder}: none of the {len(steps)} checkpoints is whole on all ranks (stderr says why; all "
                "hosts must share the folder); bring a good one back, or move them away to start anew"
            )
        return None


class _Writing:
    """One save of this rank, in a thread of its own."""

    def __init__(self, partial: Path, rank: int, tensors: dict[str, torch.Tensor], publish: _Publish | None) -> None:
        self.final = partial.with_name(partial.name[1:].removesuffix(".partial"))
        self.failure = ""
        self.in_part = True  # its own part is not on disk yet, nor given up
        self._partial, self._rank, self._tensors, self._publish = partial, rank, tensors, publish
        # A daemon: a run that ends by an error does not wait for ranks that are gone.
        self._thread = threading.Thread(target=self._run, name="training-state", daemon=True)
        self._thread.start()

    def is_busy(self, wait_s: float) -> bool:
        self._thread.join(wait_s)
        return self._thread.is_alive()

    def hear(self, failures: dict[int, str]) -> None:
        """Other ranks have failed, and may have had no room for their notes."""
        if self._publish is not None:
            self._publish.failures |= failures

    def _run(self) -> None:
        failure = _trying(lambda: files.write_part(self._partial, self._rank, self._tensors))
        self._tensors.clear()
        if failure:
            unsaid = _trying(lambda: files.write_failure(self._partial, self._rank, failure))
            failure += f"; its note could not be written ({unsaid})" if unsaid else ""
        self.in_part = False
        if self._publish is not None:
            self.hear({0: failure} if failure else {})
            failure = _trying(self._publish.run)
        if failure:
            _report(self.final, self._rank, failure)
        self.failure = failure


@dataclass
class _Publish:
    """What rank 0 does after its own part: wait for the others', make it a checkpoint, remove what is too old."""

    folder: Path
    manifest: Manifest
    keep: int
    damaged: set[int]
    timeout_s: float
    failures: dict[int, str] = field(default_factory=dict)  # that ranks have told of

    def run(self) -> None:
        partial = files.partial_path(self.folder, self.manifest.step)
        try:
            for note in self._wait_for_notes(partial):
                self.manifest.files.update(note["files"])
            files.publish(self.folder, self.manifest)
        except BaseException:
            files.discard(partial)
            raise
        unremoved = _trying(lambda: files.remove_old(self.folder, self.damaged, self.manifest.step, self.keep))
        if unremoved:
            print(f"moe-runtime: {self.folder}: old checkpoints stay: {unremoved}", file=sys.stderr, flush=True)

    def _wait_for_notes(self, partial: Path) -> list[dict[str, Any]]:
        """All ranks' notes. Raises CheckpointError when some have failed, or say nothing until the deadline."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            notes = files.read_notes(partial)
            failures = {rank: note["failed"] for rank, note in notes.items() if "failed" in note} | self.failures
            missing = sorted(set(range(self.manifest.num_ranks)) - set(notes) - set(failures))
            if not missing and failures:
                raise CheckpointError("; ".join(f"rank {rank}: {why}" for rank, why in sorted(failures.items())))
            if not missing:
                return list(notes.values())
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"rank 0 has waited {self.timeout_s:g} s for the parts of ranks {missing} in {partial}; all hosts "
                    "must share the folder, and the disk must be fast enough"
                )
            time.sleep(_TICK_S / 2)


def _keep_others_waiting(busy: list[bool], in_part: list[bool]) -> tuple[list[int], int]:
    """Ranks that write their parts where others are done with theirs; where all are, those (rank 0) that publish.

    And how many `timeout_s` that may last: of two, rank 0 may spend one waiting for the others' notes.
    """
    late = [rank for rank, writes in enumerate(in_part) if writes]
    if late:
        return (late, 1) if len(late) < len(in_part) else ([], 1)
    return [rank for rank, is_busy in enumerate(busy) if is_busy], 2


def _list(folder: Path) -> list[int]:
    files.tidy(folder, restore_only=True)
    return files.list_steps(folder)


def _prepare(folder: Path, partial: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files.tidy(folder)
    partial.mkdir()


def _check(path: Path, rank: int, size: int) -> tuple[Manifest | None, int, str]:
    """(manifest, its checksum, what is wrong with this rank's share of the files or "")."""
    try:
        manifest = Manifest.read(path / files.MANIFEST)
        files.check_files(path, manifest, slice(rank, None, size))
    except CheckpointError as error:
        return None, 0, str(error)
    return manifest, manifest.crc(), ""


def _check_same_kind(path: Path, saved: Manifest, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    if saved.optimizer != type(optimizer).__name__:
        raise CheckpointError(f"{path}: is of optimizer {saved.optimizer}, this one is {type(optimizer).__name__}")
    placement = expert_layers(model)[0].moe_runtime_layer.placement
    for word in ("num_layers", "num_experts"):
        there, here = getattr(saved.placement, word), getattr(placement, word)
        if there != here:
            raise CheckpointError(f"{path}: is of a model with {word} = {there}, this one has {here}")


def _plain(extra: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(extra))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"training state: extra must be what JSON can hold ({error})") from None


def _trying(action: Callable[[], None]) -> str:
    """What went wrong in one line, or "". For threads: whatever ends them is told by them."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - a failed save is reported, and training goes on
        return " ".join(str(error).split()) or repr(error)
    return ""


def _report(final: Path, rank: int, why: str) -> None:
    said = (
        f"moe-runtime: rank {rank}: checkpoint {final} could not be written: {why}; older ones stay, training goes on"
    )
    print(said, file=sys.stderr, flush=True)
