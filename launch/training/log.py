"""What a training run shows: rank 0's live line, a line of metrics a step or so in JSONL, and TensorBoard.

Of every rank it gathers, when it logs, where its time went and how its experts were loaded.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

import moe_runtime

from ...comm.wire import all_gather_message
from ...core.errors import ConfigError
from ...core.spans import spans
from ...model import expert_layers
from ..data import Corpus
from ..machine import resident_bytes
from .config import TrainConfig

PARTS = ("attention", "dispatch", "experts", "combine")
_BAR = 20


@dataclass
class Step:
    """What one step did. number: steps behind us. extra: the loss's balancing terms. load [L, E]: of all ranks."""

    number: int
    loss: float
    extra: float
    norm: float
    rate: float
    load: torch.Tensor
    validation: float | None = None
    stop: bool = False


class Log:
    """A context: the metrics file is open while the run lasts, and spans of time are counted."""

    def __init__(
        self, config: TrainConfig, base: Path, runtime: moe_runtime.Runtime, corpus: Corpus, first: int
    ) -> None:
        self._config, self._runtime, self._first = config, runtime, first
        self._path = metrics_path(base / config.output)
        self._file: IO[str] | None = None
        self._board: Any = None
        self._started = self._last = time.perf_counter()
        self._since = 0
        if runtime.rank:
            return
        print(runtime.describe())
        print(
            f"{corpus.describe()}; {config.steps} steps of {config.batch_size} x {config.sequence_length}"
            + (f", {config.accumulate} parts each" if config.accumulate > 1 else ""),
            flush=True,
        )
        if config.tensorboard:
            self._board = _tensorboard(base / config.tensorboard, first)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = _rows_up_to(self._path, first) if first else []
        self._path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def __enter__(self) -> Log:
        spans.on = True
        if not self._runtime.rank:
            self._file = self._path.open("a", buffering=1)
        return self

    def __exit__(self, *_: object) -> None:
        spans.on = False
        for sink in (self._file, self._board):
            if sink:
                sink.close()

    def say(self, text: str) -> None:
        """A line of rank 0's."""
        if not self._runtime.rank:
            print(text, flush=True)

    def step(self, done: Step, model: Any) -> None:
        """Every rank calls after every step."""
        self._since += 1
        if done.number % self._config.log_every and done.number != self._config.steps and done.validation is None:
            return
        seconds = time.perf_counter() - self._last
        load = self._runtime.load(model, reset=True, by_rank=True)
        layers = [layer.moe_runtime_layer for layer in expert_layers(model)]
        mine = {"seconds": spans.take(), "experts": [layer.expert_seconds for layer in layers], "memory": memory_gib()}
        for layer in layers:
            layer.expert_seconds = 0.0
        ranks = all_gather_message(self._runtime.transport, mine, "metrics")
        if not self._runtime.rank:
            self._write(done, metrics(done, self._config, self._since, seconds, load, ranks))
        self._last, self._since = time.perf_counter(), 0

    def _write(self, done: Step, row: dict[str, Any]) -> None:
        config = self._config
        per_step = (time.perf_counter() - self._started) / (done.number - self._first)
        print(line_of(row, config.steps, per_step * (config.steps - done.number)), flush=True)
        assert self._file is not None
        self._file.write(json.dumps(row) + "\n")
        if self._board:
            for name, value in scalars(row).items():
                self._board.add_scalar(name, value, done.number)

    def saved(self, folder: Path) -> None:
        """The checkpoint is on disk: its metrics go with it."""
        if self._runtime.rank:
            return
        (folder / "metrics.jsonl").write_text(self._path.read_text())
        now = time.perf_counter()
        print(f"saved {folder} in {now - self._last:.1f} s; the whole run took {now - self._started:.0f} s", flush=True)


def metrics(
    done: Step, config: TrainConfig, steps: int, seconds: float, load_RLE: np.ndarray, ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    """The row of `steps` steps that took `seconds`. Shares of time are rank 0's, forward and backward together.

    layers: of each expert layer the largest load over the mean, the load's entropy over that of a uniform one (of the
    latest step), and the rank whose experts took longest. slowest_rank: over all layers.
    """
    load = done.load.double().numpy()
    share = load_RLE.sum(axis=(1, 2)) / max(1, load_RLE.sum())
    experts = np.array([rank["experts"] for rank in ranks])
    part = load / load.sum(1, keepdims=True).clip(1)
    entropy = -(part * np.log(part.clip(1e-30))).sum(1) / np.log(load.shape[1])
    took = {
        name: sum(value for key, value in ranks[0]["seconds"].items() if key.split(" ")[0] == name) for name in PARTS
    }
    row = {
        "step": done.number,
        "loss": done.loss,
        "balancing_loss": done.extra,
        "grad_norm": done.norm,
        "learning_rate": done.rate,
        "tokens_per_s": steps * config.tokens_per_step / seconds,
        "time_share": {name: value / seconds for name, value in took.items()},
        "memory_gib": [rank["memory"] for rank in ranks],
        "rank_share": share.tolist(),
        "slowest_rank": int(experts.sum(1).argmax()),
        "layers": {
            "max_over_mean": (load.max(1) / load.mean(1).clip(1e-9)).tolist(),
            "entropy": entropy.tolist(),
            "slowest_rank": experts.argmax(0).tolist(),
        },
    }
    return row if done.validation is None else {**row, "validation_loss": done.validation}


def line_of(row: dict[str, Any], steps: int, left_s: float) -> str:
    """The row as a person sees it."""
    full = _BAR * row["step"] // steps
    bar = "#" * full + "-" * (_BAR - full)
    share = " ".join(f"rank{rank} {part:.0%}" for rank, part in enumerate(row["rank_share"]))
    took = " ".join(f"{name} {part:.0%}" for name, part in row["time_share"].items())
    validation = f"  validation {row['validation_loss']:.3f}" if "validation_loss" in row else ""
    return (
        f"step {row['step']:>5}/{steps} [{bar}]  loss {row['loss']:.3f}{validation}  "
        f"{row['tokens_per_s']:>7,.0f} tokens/s  "
        f"load {share} (most over mean {max(row['layers']['max_over_mean']):.2f})  time {took}  "
        f"{max(row['memory_gib']):.1f} GiB  {left_s:.0f} s left"
    )


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The row's numbers by the names that TensorBoard shows them under."""
    flat = {key: row[key] for key in ("loss", "balancing_loss", "grad_norm", "learning_rate", "tokens_per_s")}
    if "validation_loss" in row:
        flat["validation_loss"] = row["validation_loss"]
    flat |= {f"time/{name}": share for name, share in row["time_share"].items()}
    for name in ("max_over_mean", "entropy"):
        flat |= {f"{name}/layer_{layer}": value for layer, value in enumerate(row["layers"][name])}
    return flat | {f"load/rank_{rank}": share for rank, share in enumerate(row["rank_share"])}


def metrics_path(output: Path) -> Path:
    """Where a run writes its metrics while it lasts: beside the checkpoint that it will write."""
    return output.with_name(output.name + ".metrics.jsonl")


def memory_gib() -> float:
    """The most this rank has held: of its device where it has one that counts, else of the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resident_bytes(peak=True) / 2**30


def watch_attention(model: Any) -> None:
    """Count the time of attention modules, forward and backward, under "attention"."""

    def before(module: Any, given: tuple, named: dict) -> None:
        if spans.on:
            spans.begin("attention")

    def after(module: Any, given: tuple, named: dict, out: Any) -> None:
        if spans.on:
            spans.end("attention")
            hidden = named.get("hidden_states", given[0] if given else None)
            spans.around_backward("attention (backward)", out[0] if isinstance(out, tuple) else out, hidden)

    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after, with_kwargs=True)


def _rows_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows that a run which goes on after `step` keeps; a torn last line is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return [row for row in rows if row["step"] <= step]


def _tensorboard(folder: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "tensorboard: the package is not installed; pip install tensorboard, or leave it out"
        ) from None
    return SummaryWriter(os.fspath(folder), purge_step=first + 1 if first else None)
