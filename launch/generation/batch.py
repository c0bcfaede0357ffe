"""The running batch of one rank: sequences enter as others end, one forward pass of transformers' own model at a time.

transformers' continuous batching (`generate_batch`, 5.23) is not used: its paged cache takes one width for keys and
values, which DeepSeek's attention does not have, it knows no indexed or compressed layers (V3.2, V4), and it decides by
itself, in a thread, when to run a pass, while ranks must pass expert layers in step. It does run Qwen3 and gpt-oss.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from . import sampling
from .cache import append_rows, can_splice, cut_columns, keep_rows

# Of generation_config.json: what is read, what options stand for, and what does not change which tokens come.
_NOT_ABOUT_TOKENS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p", "max_length",
    "max_new_tokens", "transformers_version", "_from_model_config", "use_cache", "cache_implementation",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What all sequences have in common. prefill_chunk: tokens of one prefill pass, padding included."""

    max_new_tokens: int = 64
    batch_size: int = 8
    prefill_chunk: int = 512
    sampling: sampling.Sampling = sampling.Sampling()
    stop: tuple[str, ...] = ()
    logprobs: bool = False


@dataclass
class Sequence:
    """A prompt's ids, and what has come of it. `text` is None until it has ended."""

    number: int  # of its line
    ids: list[int]
    limit: int  # new tokens at most
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    visible: list[int] = field(default_factory=list)  # tokens that are text
    text: str | None = None

    @property
    def input(self) -> list[int]:
        """What its first pass runs: the prompt, and the tokens that it has already where it goes on from others."""
        return self.ids + self.tokens


class RunningBatch:
    """`add` sequences, `run` some passes, get those that have ended.

    Where `splices` is false (V4), rows cannot enter and leave: sequences of equal length start together, and the next
    ones when all have ended.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.model, self._tokenizer, self.settings = model, tokenizer, settings
        self.splices = not model._is_stateful and can_splice(DynamicCache(config=model.config))
        self._waiting: deque[Sequence] = deque()
        self._running = _Rows(model, [])
        self._entering: _Rows | None = None
        end = model.generation_config.eos_token_id
        self._ends = set(end if isinstance(end, list) else [end])
        self._special = set(tokenizer.all_special_ids)
        # A token of text has at least one byte; one more, as decoding may drop a space at the start.
        self._stop_tokens = 1 + max((len(stop.encode()) for stop in settings.stop), default=0)

    def describe(self) -> list[str]:
        """What runs, and what the checkpoint asks for that does not."""
        size, name = self.settings.batch_size, self.model.config.model_type
        how = "refilled as sequences end" if self.splices else "fixed"
        lines = [f"batch: {size} sequences a rank, {how}"]
        if not self.splices:
            lines[0] += f": {name} keeps states that cannot be padded; prompts of one length start and end together"
            lines[0] += ", prefilled whole"
        asked = set(self.model.generation_config.to_diff_dict()) - _NOT_ABOUT_TOKENS
        if asked:
            lines.append(f"note: generation_config.json: {', '.join(sorted(asked))} not applied")
        return lines

    def add(
        self,
        number: int,
        prompt: str,
        limit: int | None = None,
        tokens: Iterable[int] = (),
        logprobs: Iterable[float] = (),
    ) -> None:
        """limit: new tokens of this one, if not all that settings allow. tokens, logprobs: what it has already, of a
        rank that is gone; it goes on from there."""
        ids, known = self._tokenizer.encode(prompt), list(tokens)
        sequence = Sequence(number, ids, limit or self.settings.max_new_tokens, known, list(logprobs))
        sequence.visible = [token for token in known if token not in self._special]
        self._waiting.append(sequence)

    def sequences(self) -> list[Sequence]:
        """Those that have not ended."""
        entering = self._entering.sequences if self._entering else []
        return [*self._running.sequences, *entering, *self._waiting]

    def take_back(self) -> None:
        """After a pass that was broken off: its part in caches is dropped, and where that cannot be done, sequences
        begin again from their prompts and tokens."""
        if self._entering is not None:
            self._waiting.extendleft(reversed(self._entering.sequences))
            self._entering = None
        if not self._running.take_back():
            self._waiting.extendleft(reversed(self._running.sequences))
            self._running = _Rows(self.model, [])

    @property
    def held(self) -> int:
        """Sequences that have not ended."""
        return (
            len(self._waiting) + len(self._entering.sequences if self._entering else ()) + len(self._running.sequences)
        )

    def run(self, passes: int) -> list[Sequence]:
        """At most this many forward passes, fewer if there is nothing left to do; the sequences that have ended."""
        ended: list[Sequence] = []
        while passes and self.held:
            ended += self.step()
            passes -= 1
        return ended

    def step(self) -> list[Sequence]:
        """One forward pass; the sequences that have ended with it."""
        if self._entering is None:
            self._entering = self._next_group()
        rows = self._entering or self._running
        logits = rows.prefill(self._chunk(rows)) if self._entering else rows.decode()
        if logits is None:
            return []
        ended = self._take_tokens(rows.sequences, logits)
        if self.splices:
            rows.keep([at for at, sequence in enumerate(rows.sequences) if sequence.text is None])
        elif all(sequence.text is not None for sequence in rows.sequences):
            rows.sequences = []
        if self._entering:
            self._running, self._entering = self._running.joined_by(rows), None
        return ended

    def _next_group(self) -> _Rows | None:
        room = self.settings.batch_size - len(self._running.sequences)
        if not self._waiting or not room or (self._running.sequences and not self.splices):
            return None
        lengths = [len(sequence.input) for sequence in self._waiting]
        chosen = set(together(lengths, room, self.settings.prefill_chunk, padding=self.splices))
        group = [sequence for at, sequence in enumerate(self._waiting) if at in chosen]
        self._waiting = deque(sequence for at, sequence in enumerate(self._waiting) if at not in chosen)
        return _Rows(self.model, group, self._tokenizer.pad_token_id or 0)

    def _chunk(self, rows: _Rows) -> int:
        """Columns of one prefill pass."""
        return max(1, self.settings.prefill_chunk // len(rows.sequences)) if self.splices else rows.ids.shape[1]

    def _take_tokens(self, sequences: list[Sequence], logits: torch.Tensor) -> list[Sequence]:
        """Each running row's next token from logits [B, V] float32; the sequences that end with theirs."""
        drawn = [(sequence.number, len(sequence.tokens)) for sequence in sequences]
        tokens_B = sampling.choose(logits, self.settings.sampling, drawn)
        logprobs = sampling.log_probabilities(logits, tokens_B) if self.settings.logprobs else None
        ended = []
        for row, (sequence, token) in enumerate(zip(sequences, tokens_B.tolist(), strict=True)):
            if sequence.text is None:
                sequence.tokens.append(token)
                sequence.visible += [token] * (token not in self._special)
                sequence.logprobs += logprobs[row : row + 1] if logprobs else []
                sequence.text = self._text_if_ended(sequence)
                ended += [sequence] * (sequence.text is not None)
        return ended

    def _text_if_ended(self, sequence: Sequence) -> str | None:
        if any(stop in self._decode(sequence.visible[-self._stop_tokens :]) for stop in self.settings.stop):
            text = self._decode(sequence.visible)
            found = [at for at in map(text.find, self.settings.stop) if at >= 0]
            if found:
                return text[: min(found)]
        if sequence.tokens[-1] in self._ends or len(sequence.tokens) >= sequence.limit:
            return self._decode(sequence.tokens)
        return None

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


class _Rows:
    """Sequences that share forward passes: their cache, and the mask [B, S] of columns that are not padding."""

    def __init__(self, model: Any, sequences: list[Sequence], padding: int = 0) -> None:
        self._model, self.sequences = model, sequences
        self.cache = DynamicCache(config=model.config)
        self.ids, self.mask = (tensor.to(model.device) for tensor in pad_left([s.input for s in sequences], padding))
        self._done = 0  # columns that are in the cache
        self._decoded = True  # the latest column as well

    def prefill(self, columns: int) -> torch.Tensor | None:
        """Run the next columns of the prompts. Logits [B, V] after the last one, None before."""
        until = min(self._done + columns, self.ids.shape[1])
        logits = self._forward(self.ids[:, self._done : until], self.mask[:, :until])
        self._done = until
        return logits if until == self.ids.shape[1] else None

    def decode(self) -> torch.Tensor:
        """Run each row's latest token. Logits [B, V]."""
        latest = torch.tensor([[sequence.tokens[-1]] for sequence in self.sequences], device=self.mask.device)
        self.mask, self._decoded = torch.cat([self.mask, torch.ones_like(latest)], dim=1), False
        logits = self._forward(latest, self.mask)
        self._decoded = True
        return logits

    def take_back(self) -> bool:
        """Undo a decoding pass that was broken off: whether the cache could be cut back to where it was."""
        if not self.sequences:
            return True
        length = self.mask.shape[1] if self._decoded else self.mask.shape[1] - 1
        if not cut_columns(self.cache, length):
            return False
        self.mask, self._decoded = self.mask[:, :length], True
        return True

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, and columns that are padding in all that stay."""
        if len(rows) == len(self.sequences):
            return
        self.sequences = [self.sequences[row] for row in rows]
        if not rows:
            return
        index = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask.index_select(0, index)
        length = int(self.mask.sum(1).max())
        self.mask = self.mask[:, -length:]
        keep_rows(self.cache, index, length)

    def joined_by(self, other: _Rows) -> _Rows:
        """These rows and the other's below them."""
        if not self.sequences or not other.sequences:
            return self if self.sequences else other
        length = max(self.mask.shape[1], other.mask.shape[1])
        append_rows(self.cache, other.cache, length)
        masks = [torch.nn.functional.pad(mask, [length - mask.shape[1], 0]) for mask in (self.mask, other.mask)]
        self.mask, self.sequences = torch.cat(masks), self.sequences + other.sequences
        return self

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = (mask.cumsum(1)[:, -ids.shape[1] :] - 1).clamp(min=0)
        cache, last = _forward_words(type(self._model))
        words = {cache: self.cache, **last}
        out = self._model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **words)
        return out.logits[:, -1].float().cpu()


@functools.cache
def _forward_words(model: type) -> tuple[str, dict[str, int]]:
    """What this class's forward calls the cache (another word in newer transformers), and how it is asked for the
    last position's logits alone, so that there are never those of a whole prompt."""
    takes = inspect.signature(model.forward).parameters
    return (
        "cache" if "cache" in takes else "past_key_values",
        {"logits_to_keep": 1} if "logits_to_keep" in takes else {},
    )


def together(lengths: list[int], room: int, tokens: int, padding: bool = True) -> list[int]:
    """Which waiting prompts (indices, the first always) share the next prefill: at most `room`, and with padding no
    more than `tokens` and no more padding than prompt. padding=False: only those as long as the first."""
    chosen, longest, real = [0], lengths[0], lengths[0]
    for index, length in enumerate(lengths[1:], 1):
        area = max(longest, length) * (len(chosen) + 1)
        fits = area <= tokens and area <= 2 * (real + length) if padding else length == longest
        if len(chosen) < room and fits:
            chosen.append(index)
            longest, real = max(longest, length), real + length
    return chosen


def pad_left(sequences: list[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both [B, longest] int64."""
    longest = max(map(len, sequences), default=0)
    ids = torch.full((len(sequences), longest), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = 1
    return ids, mask
