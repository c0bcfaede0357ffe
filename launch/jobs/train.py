"""The training job that `moe-launch train CONFIG.toml` starts on every rank.

Data-parallel attention, sharded experts; the joined batch and the result do not depend on the number of ranks (to
rounding). Settings are those of TrainConfig; an unknown key is an error.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import moe_runtime

from ...core.config import RuntimeConfig
from ...core.errors import ConfigError
from ..data import Batches, byte_tokens, text_files
from ..tokenizers import byte_tokenizer
from ..toml import apply_overrides, read_toml


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Paths are relative to the config file.

    model: fields of a transformers config with `model_type`, or `checkpoint = "DIR"` to start from one.
    files: text files, globs, or "python-standard-library"; read as bytes.
    batch_size: sequences of all ranks together per step. output: folder of the checkpoint that is written.
    placement: a plan file. record: the load trace of this run is written there (.npz).
    """

    model: dict[str, Any]
    files: list[str]
    output: str
    cluster: str | None = None
    placement: str | None = None
    record: str | None = None
    dtype: str = "float32"
    sequence_length: int = 256
    batch_size: int = 16
    steps: int = 100
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    log_every: int = 10
    timeout_s: float = 300.0
    runtime: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for setting in fields(self):
            _check_kind(setting.name, str(setting.type), getattr(self, setting.name))
        for name in ("sequence_length", "batch_size", "steps", "log_every"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")

    @classmethod
    def from_table(cls, table: dict[str, Any], where: str) -> TrainConfig:
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(table) - known)
        if unknown:
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}")
        missing = [name for name in ("model", "files", "output") if name not in table]
        if missing:
            raise ConfigError(f"{where}: missing key {missing[0]!r}")
        return cls(**table)


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a string"),
    "str | None": ((str, type(None)), "a string"),
    "list[str]": ((list,), "a list of strings"),
    "dict[str, Any]": ((dict,), "a table"),
}


def _check_kind(name: str, annotation: str, value: Any) -> None:
    kinds, words = _KINDS[annotation]
    good = isinstance(value, kinds) and not isinstance(value, bool)
    if not good or (annotation == "list[str]" and not all(isinstance(item, str) for item in value)):
        raise ConfigError(f"{name} must be {words}, got {value!r}")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(config: TrainConfig, base: Path, runtime: moe_runtime.Runtime) -> list[float]:
    """Run the whole job on this rank; returns the loss of every step (mean over the joined batch)."""
    tokens = byte_tokens(text_files(config.files, base))
    batches = Batches(tokens, config.sequence_length, config.batch_size, config.seed)
    model = _make_model(config, base, runtime)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
    )
    log = _Log(config, runtime, len(tokens))
    model.train()
    losses = []
    with runtime.record(model, base / config.record) if config.record else nullcontext():
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            ids = batches.of_rank(step, runtime.rank, runtime.size).to(runtime.device)
            losses.append(train_step(runtime, model, optimizer, ids, config))
            runtime.rebalance_step(model, optimizer)
            log.step(step, losses[-1], model)
    model.eval()
    folder = (base / config.output).resolve()
    runtime.save_model(model, folder, tokenizer=byte_tokenizer())
    log.saved(folder)
    return losses


def train_step(
    runtime: moe_runtime.Runtime, model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, config: TrainConfig
) -> float:
    """One optimizer step on this rank's sequences [B, length + 1]; returns the mean loss of the joined batch."""
    total_tokens = config.batch_size * config.sequence_length
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    # Summed and divided by the tokens of all ranks: gradients then add up to those of the joined batch.
    loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / total_tokens
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    runtime.sync_gradients(model)
    runtime.clip_grad_norm(model, config.max_grad_norm)
    optimizer.step()
    joined = loss.detach().cpu().double()
    runtime.transport.all_reduce(joined, "training loss")
    if not math.isfinite(joined):
        raise FloatingPointError(f"the loss is {float(joined)}; lower learning_rate or look at the data")
    return float(joined)


def _make_model(config: TrainConfig, base: Path, runtime: moe_runtime.Runtime) -> Any:
    from transformers import AutoConfig

    dtype = getattr(torch, config.dtype)
    placement = base / config.placement if config.placement else None
    if set(config.model) == {"checkpoint"}:
        folder = base / config.model["checkpoint"]
        return runtime.load_model(folder, dtype=dtype, placement=placement, expert_dtype=config.dtype)
    settings = dict(config.model)
    model_type = settings.pop("model_type", None)
    if not model_type:
        raise ConfigError("model: give model_type and its fields, or checkpoint")
    try:
        model_config = AutoConfig.for_model(model_type, **settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from error
    unknown = sorted(set(settings) - set(type(model_config)().to_dict()) - set(model_config.attribute_map))
    if unknown:
        raise ConfigError(f"model: {model_type} has no setting {unknown[0]!r}")
    return runtime.create_model(model_config, dtype, seed=config.seed, placement=placement)


class _Log:
    """Rank 0's live line, and metrics.jsonl beside the checkpoint."""

    def __init__(self, config: TrainConfig, runtime: moe_runtime.Runtime, tokens: int) -> None:
        self._config, self._runtime = config, runtime
        self._started = self._last = time.perf_counter()
        self._metrics: list[dict] = []
        if runtime.rank == 0:
            print(runtime.describe())
            print(
                f"data: {tokens:,} byte tokens; {config.steps} steps of {config.batch_size} x {config.sequence_length}"
            )

    def step(self, step: int, loss: float, model: Any) -> None:
        if (step + 1) % self._config.log_every and step + 1 != self._config.steps:
            return
        rows = self._runtime.load(model, reset=True, by_rank=True).sum(axis=(1, 2))  # every rank calls
        if self._runtime.rank:
            return
        now = time.perf_counter()
        since = (step % self._config.log_every) + 1
        rate = since * self._config.batch_size * self._config.sequence_length / (now - self._last)
        left = (now - self._started) / (step + 1) * (self._config.steps - step - 1)
        self._last = now
        share = (rows / max(1, rows.sum())).tolist()
        print(
            f"step {step + 1:>5}/{self._config.steps}  loss {loss:.3f}  {rate:>7,.0f} tokens/s  "
            f"load {' '.join(f'rank{r} {s:.0%}' for r, s in enumerate(share))}  {left:.0f} s left",
            flush=True,
        )
        record = {"step": step + 1, "loss": loss, "tokens_per_s": rate, "rank_share": share}
        self._metrics.append(record)

    def saved(self, folder: Path) -> None:
        if self._runtime.rank == 0:
            lines = "".join(json.dumps(record) + "\n" for record in self._metrics)
            (folder / "metrics.jsonl").write_text(lines)
            print(
                f"saved {folder} in {time.perf_counter() - self._last:.1f} s; the whole run took "
                f"{time.perf_counter() - self._started:.0f} s"
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moe-launch train", description="train a mixture-of-experts model")
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--cluster", help="cluster file; overrides the config's")
    arguments = parser.parse_args(argv)
    table = apply_overrides(read_toml(arguments.config), arguments.overrides)
    config = TrainConfig.from_table(table, str(arguments.config))
    base = arguments.config.resolve().parent
    cluster = arguments.cluster or (str(base / config.cluster) if config.cluster else None)
    settings = {"cluster": cluster, "timeout_s": config.timeout_s, **config.runtime}
    with moe_runtime.init(RuntimeConfig.from_any(settings)) as runtime:
        train(config, base, runtime)
    return 0


if __name__ == "__main__":
    sys.exit(main())
