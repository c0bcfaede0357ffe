"""The training loop: data-parallel attention, sharded experts, and a joined batch that no number of ranks changes.

`train` is the whole job on one rank. Every rank does the same things in the same order; what differs is its sequences.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import moe_runtime

from ...balance import RouterBalance
from ...comm.wire import all_gather_message
from ...core.errors import ConfigError, NotFinite
from ...optimizer import MasterAdamW, accumulate_in_float32
from ...recompute import recompute
from ...training_state import Checkpoints
from ..data import Batches, Corpus, ValidationBatches, held_out, open_corpus
from ..tokenizers import load_tokenizer
from . import finite
from .config import TrainConfig, learning_rate
from .log import Log, Step, watch_attention
from .profile import profiler


def train(config: TrainConfig, base: Path, runtime: moe_runtime.Runtime) -> list[float]:
    """Run the whole job on this rank; returns the loss of every step it took (mean over the joined batch)."""
    data = Data(config, base, runtime)
    checkpoints = None
    if config.checkpoints:
        checkpoints = Checkpoints(runtime, base / config.checkpoints, config.keep_checkpoints)
    going_on = checkpoints if config.resume else None
    trainer = Trainer(config, base, runtime, data, going_on.saved_placement() if going_on else None)
    first = trainer.resume(going_on) if going_on else 0
    losses: list[float] = []
    recording = runtime.record(trainer.model, base / config.record) if config.record else nullcontext()
    with (
        Log(config, base, runtime, data.corpus, first) as log,
        recording,
        profiler(config, base, runtime.rank) as profile,
        _told_to_stop() as stop,
        _kept(checkpoints),
    ):
        for step in range(first, config.steps):
            done = trainer.step(step, bool(stop))
            losses.append(done.loss)
            last = step + 1 == config.steps
            if data.validation and (last or (config.validate_every and (step + 1) % config.validate_every == 0)):
                done.validation = trainer.validate()
            log.step(done, trainer.model)
            profile.step()
            if checkpoints and (last or done.stop or (step + 1) % config.checkpoint_every == 0):
                checkpoints.save(step + 1, trainer.model, trainer.optimizer, {"identity": config.identity()})
            if done.stop:
                log.say(f"asked to stop after step {done.number}; {'it is kept' if checkpoints else 'nothing is kept'}")
                break
    if losses and done.stop:
        sys.exit(128 + signal.SIGTERM)
    trainer.model.eval()
    folder = (base / config.output).resolve()
    runtime.save_model(trainer.model, folder, tokenizer=data.tokenizer)
    log.saved(folder)
    return losses


@contextmanager
def _kept(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Wait for the last save to be on disk, also where all ranks stop because of a loss that is not finite."""
    try:
        yield
    except NotFinite:
        if checkpoints:
            checkpoints.close()
        raise
    if checkpoints:
        checkpoints.close()


def export(config: TrainConfig, base: Path, runtime: moe_runtime.Runtime, folder: Path) -> None:
    """Write the model of the newest checkpoint as a Hugging Face checkpoint, on any number of ranks."""
    if not config.checkpoints:
        raise ConfigError("--export writes what a run has kept: `checkpoints` must name its folder")
    data = Data(config, base, runtime)
    checkpoints = Checkpoints(runtime, base / config.checkpoints, config.keep_checkpoints)
    trainer = Trainer(config, base, runtime, data, checkpoints.saved_placement())
    step = trainer.resume(checkpoints)
    if not step:
        raise ConfigError(f"{checkpoints.folder}: there is no checkpoint to export")
    trainer.model.eval()
    runtime.save_model(trainer.model, folder, tokenizer=data.tokenizer)
    if runtime.rank == 0:
        print(f"exported step {step} to {folder}", flush=True)


class Data:
    """What is trained and validated on: the same tokens on every rank, each rank its own windows of them."""

    def __init__(self, config: TrainConfig, base: Path, runtime: moe_runtime.Runtime) -> None:
        with runtime.same_outcome("read the tokenizer"):
            kind = "bytes" if config.tokenizer == "bytes" else "auto"
            self.tokenizer = load_tokenizer(kind, base / config.tokenizer)
        self.corpus = self._open(config, base, runtime, config.files)
        tokens, sizes = self.corpus.tokens, (config.sequence_length, config.batch_size)
        out = (
            held_out(tokens, config.sequence_length, config.validation_fraction) if config.validation_fraction else None
        )
        self.batches = Batches(tokens, *sizes, config.seed, out)
        self.validation: ValidationBatches | None = None
        if config.validation_files:
            tokens = self._open(config, base, runtime, config.validation_files).tokens
            self.validation = ValidationBatches(tokens, *sizes, at_most=config.validation_sequences)
        elif out is not None:
            self.validation = ValidationBatches(tokens, *sizes, out, config.validation_sequences)

    def _open(self, config: TrainConfig, base: Path, runtime: moe_runtime.Runtime, sources: list[str]) -> Corpus:
        """One rank of each host makes the tokens, the others map what it made."""
        corpus = None
        for turn in (True, False):
            with runtime.same_outcome("read the data"):
                if (runtime.world.local_rank == 0) == turn:
                    corpus = open_corpus(sources, base, self.tokenizer, text_key=config.text_key)
        assert corpus is not None
        for rank, digest in enumerate(all_gather_message(runtime.transport, corpus.digest, "compare the data")):
            if digest != corpus.digest:
                raise ConfigError(
                    f"files: rank {rank} reads other data than rank {runtime.rank}; copy the same to both"
                )
        return corpus


class Trainer:
    """A model, its optimizer, and one step or validation of them."""

    def __init__(
        self, config: TrainConfig, base: Path, runtime: moe_runtime.Runtime, data: Data, placement: Any = None
    ) -> None:
        self.config, self.runtime, self.data = config, runtime, data
        self.model = make_model(config, base, runtime, placement)
        data.corpus.check_vocabulary(self.model.config.get_text_config().vocab_size)
        recompute(self.model, config.recompute)
        accumulate_in_float32(self.model.parameters())
        self.optimizer = MasterAdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=runtime.device.type in ("cpu", "cuda"),  # one pass over the state; others may not have it
        )
        watch_attention(self.model)
        self.balance = RouterBalance(self.model, runtime.transport, config.balance)
        self.model.train()

    def resume(self, checkpoints: Checkpoints) -> int:
        """The number of steps that the newest checkpoint has behind it; 0 where there is none."""
        found = checkpoints.load(self.model, self.optimizer)
        if found is None:
            return 0
        for name, value in self.config.identity().items():
            before = found["identity"].get(name)
            if before != value:
                raise ConfigError(
                    f"{name} is {value!r}, but the checkpoints in {checkpoints.folder} are of a run with {before!r}; "
                    "set it back, give another `checkpoints` folder, or set resume = false"
                )
        if self.runtime.rank == 0:
            print(f"going on after step {found['step']} from {checkpoints.folder}", flush=True)
        return int(found["step"])

    def step(self, number: int, stop: bool = False) -> Step:
        """One optimizer step. stop: this rank has been told to; where any has, all are told (Step.stop)."""
        config, runtime = self.config, self.runtime
        rate = learning_rate(config, number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        ids = self.data.batches.of_rank(number, runtime.rank, runtime.size).to(runtime.device)
        self.optimizer.zero_grad(set_to_none=True)
        told = torch.zeros(3, dtype=torch.float64)  # loss, balancing terms, ranks told to stop
        told[2] = float(stop)
        for part in parts(ids, config.accumulate):
            text, extra = self.losses(part)
            (text + extra).backward()
            told[0] += text.detach().cpu().double()
            told[1] += float(extra.detach() if isinstance(extra, torch.Tensor) else extra)
        runtime.sync_gradients(self.model)
        norm = runtime.clip_grad_norm(self.model, config.max_grad_norm)
        runtime.transport.all_reduce(told, "training loss")
        loss, extra = told[:2].tolist()
        finite.check(self, number, ids, loss + extra, norm)
        self.optimizer.step()
        load = self.balance.step()
        runtime.rebalance_step(self.model, self.optimizer)
        return Step(number + 1, loss, extra, norm, rate, load, stop=bool(told[2]))

    def losses(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """(text, balancing) of sequences [B, length + 1]: sums over all ranks and parts are means over the batch."""
        logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
        text = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        tokens = self.config.tokens_per_step
        return text / tokens, self.balance.loss(len(ids), self.config.batch_size, tokens)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss per token over the validation windows, the same on every rank."""
        self.model.eval()
        batches, runtime = self.data.validation, self.runtime
        total = torch.zeros((), dtype=torch.float64)
        for step in range(batches.steps):
            ids = batches.of_rank(step, runtime.rank, runtime.size).to(runtime.device)
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").cpu().double()
        runtime.transport.all_reduce(total, "validation loss")
        self.model.train()
        return float(total) / (batches.sequences * self.config.sequence_length)


def parts(ids: torch.Tensor, count: int) -> list[torch.Tensor]:
    """A rank's sequences in `count` runs as equal as possible; some may be empty, and all ranks make as many passes."""
    return [ids[len(ids) * n // count : len(ids) * (n + 1) // count] for n in range(count)]


def make_model(config: TrainConfig, base: Path, runtime: moe_runtime.Runtime, placement: Any = None) -> Any:
    """A fresh model of the config's fields, or the checkpoint that it names. placement: where checkpoints have one."""
    from transformers import AutoConfig

    dtype = getattr(torch, config.dtype)
    placement = placement or (base / config.placement if config.placement else None)
    if set(config.model) == {"checkpoint"}:
        return runtime.load_model(base / config.model["checkpoint"], dtype=dtype, placement=placement)
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


@contextmanager
def _told_to_stop() -> Iterator[list[int]]:
    """While this lasts SIGTERM (a scheduler's, or the launcher's) is noted in the list instead of ending the rank."""
    noted: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
