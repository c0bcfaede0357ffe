"""The settings of a training run: `moe-launch train CONFIG.toml`. Unknown keys and wrong kinds are errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from ...balance import Balance
from ...core.errors import ConfigError
from ...recompute import CHOICES as RECOMPUTE


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Paths are relative to the config file.

    model: fields of a transformers config with `model_type`, or `checkpoint = "DIR"` to start from one.
    files: text files, folders, globs, JSONL, token arrays, or "python-standard-library" (docs/data.md).
    tokenizer: "bytes", or the folder of a Hugging Face tokenizer. text_key: where JSONL lines keep their text.
    output: folder of the Hugging Face checkpoint that is written at the end.
    batch_size: sequences of all ranks together per step, worked on in `accumulate` parts one after the other.
    dtype: of weights and rows; in bfloat16 the optimizer keeps float32 masters. recompute: see recompute.py.
    bias_update_rate, sequence_loss, z_loss: balancing (balance.py), 0 for off.
    validation_files, or validation_fraction of `files`: looked at every `validate_every` steps (0: at the end).
    checkpoints: folder of what a run goes on from (docs/checkpoints.md), written every `checkpoint_every` steps and
        kept `keep_checkpoints` times; a run that finds some there goes on from the newest, unless resume is false.
    tensorboard: folder. profile: folder of traces for Perfetto, one a rank, of `profile_steps` steps from
        `profile_from` on. placement: a plan file. record: the load trace of this run is written there (.npz).
    """

    model: dict[str, Any]
    files: list[str]
    output: str
    cluster: str | None = None
    placement: str | None = None
    record: str | None = None
    tokenizer: str = "bytes"
    text_key: str = "text"
    validation_files: list[str] = field(default_factory=list)
    validation_fraction: float = 0.0
    validate_every: int = 0
    validation_sequences: int = 512
    dtype: str = "float32"
    sequence_length: int = 256
    batch_size: int = 16
    accumulate: int = 1
    recompute: str = "none"
    steps: int = 100
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    bias_update_rate: float = 0.0
    sequence_loss: float = 0.0
    z_loss: float = 0.0
    checkpoints: str | None = None
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    resume: bool = True
    tensorboard: str | None = None
    profile: str | None = None
    profile_from: int = 5
    profile_steps: int = 2
    seed: int = 0
    log_every: int = 10
    timeout_s: float = 300.0
    runtime: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for setting in fields(self):
            _check_kind(setting.name, str(setting.type), getattr(self, setting.name))
        at_least_1 = ("sequence_length", "batch_size", "steps", "log_every", "accumulate", "checkpoint_every",
                      "keep_checkpoints", "validation_sequences", "profile_steps")  # fmt: skip
        at_least_0 = ("warmup_steps", "bias_update_rate", "sequence_loss", "z_loss", "validate_every", "profile_from")
        for names, least in ((at_least_1, 1), (at_least_0, 0)):
            for name in names:
                if not getattr(self, name) >= least:
                    raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.recompute not in RECOMPUTE:
            raise ConfigError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {self.recompute!r}")
        if self.validation_files and self.validation_fraction:
            raise ConfigError("validation_files and validation_fraction say the same thing; give one of them")
        if self.accumulate > self.batch_size:
            raise ConfigError(f"accumulate = {self.accumulate} parts of a batch of {self.batch_size}: some are empty")

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

    @property
    def balance(self) -> Balance:
        return Balance(self.bias_update_rate, self.sequence_loss, self.z_loss)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step predicts, of all ranks."""
        return self.batch_size * self.sequence_length

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on: another of these, and its steps would mean something else."""
        names = ("model", "files", "tokenizer", "text_key", "validation_fraction", "dtype", "sequence_length",
                 "batch_size", "seed")  # fmt: skip
        return {name: getattr(self, name) for name in names}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a string"),
    "str | None": ((str, type(None)), "a string"),
    "list[str]": ((list,), "a list of strings"),
    "dict[str, Any]": ((dict,), "a table"),
}


def _check_kind(name: str, annotation: str, value: Any) -> None:
    kinds, words = _KINDS[annotation]
    good = isinstance(value, kinds) and (annotation == "bool" or not isinstance(value, bool))
    if not good or (annotation == "list[str]" and not all(isinstance(item, str) for item in value)):
        raise ConfigError(f"{name} must be {words}, got {value!r}")
