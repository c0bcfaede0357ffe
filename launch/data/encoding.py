"""Text to token ids by a Hugging Face tokenizer, with a fast path for the byte-level one that gives the same ids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import ConfigError
from ..tokenizers import END_OF_TEXT, PADDING, byte_tokenizer
from .documents import Tally, decoded

_BATCH = 1 << 21  # bytes encoded together: enough for all cores; tokenizers needs some hundred times as much memory
_SPECIAL = {b"<|end|>": END_OF_TEXT, b"<|pad|>": PADDING}
_SPECIAL_PATTERN = re.compile(b"(" + b"|".join(re.escape(word) for word in _SPECIAL) + b")")


def identity(tokenizer: Any) -> str:
    """A digest of all that decides which ids a text gets; equal for two loads of one tokenizer."""
    if getattr(tokenizer, "is_fast", False):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state = {name: part for name, part in state.items() if name not in ("truncation", "padding")}  # not used here
    else:
        state = [type(tokenizer).__name__, str(tokenizer), sorted(tokenizer.get_vocab().items())]
    text = json.dumps([state, tokenizer.eos_token_id, _splits_special(tokenizer)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Encoder:
    """Pieces of documents to ids, `end` after each document. dtype: uint16, or uint32 for more than 65,536 ids.

    Special tokens spelled out in a text become those tokens, as the tokenizer does by default; a beginning-of-text
    token is not added. Raises ConfigError for a tokenizer that has no end-of-text token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer is None:
            raise ConfigError("data: text needs a tokenizer; give one, or name token arrays (.npy, .bin) only")
        if tokenizer.eos_token_id is None:
            raise ConfigError("data: the tokenizer has no end-of-text token (eos_token) to put after each document")
        self.end: int = tokenizer.eos_token_id
        self.identity = identity(tokenizer)
        self.bytes_only = self.identity == identity(byte_tokenizer())
        largest = max(max(tokenizer.get_vocab().values()), self.end)
        self.dtype = np.dtype(np.uint16 if largest < 1 << 16 else np.uint32)
        self._tokenizer = tokenizer

    def encode(self, pieces: Iterable[tuple[bytes, bool, Path]], tally: Tally) -> Iterator[np.ndarray]:
        """Ids of `pieces` (bytes, whether the document ends, its file): arrays [n] of dtype, some _BATCH bytes each."""
        end = np.array([self.end], self.dtype)
        for batch in _batches(pieces):
            ids = self._encode(batch, tally)
            ends = [end if last else end[:0] for _, last, _ in batch]
            yield np.concatenate(list(chain.from_iterable(zip(ids, ends, strict=True))))

    def _encode(self, batch: list[tuple[bytes, bool, Path]], tally: Tally) -> list[np.ndarray]:
        if self.bytes_only:
            return [encode_bytes(piece) for piece, _, _ in batch]
        texts = [decoded(piece, path, tally) for piece, _, path in batch]
        return [np.array(ids, dtype=self.dtype) for ids in self._encode_texts(texts)]

    @cached_property
    def _encode_texts(self) -> Callable[[list[str]], list[list[int]]]:
        return _text_encoder(self._tokenizer)  # made late: most ranks only map what another has made


def _text_encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """What tokenizer(texts, add_special_tokens=False) does, without the offsets into the text: twice as fast."""
    if not getattr(tokenizer, "is_fast", False):
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # A copy, as truncation and padding are switched off.
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = _splits_special(tokenizer)
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _splits_special(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "split_special_tokens", False))


def encode_bytes(piece: bytes) -> np.ndarray:
    """What byte_tokenizer() gives for these bytes as text, and also for bytes that are no UTF-8: uint16 [n]."""
    if not _SPECIAL_PATTERN.search(piece):
        return np.frombuffer(piece, np.uint8).astype(np.uint16)
    parts = _SPECIAL_PATTERN.split(piece)
    return np.concatenate(
        [
            np.array([_SPECIAL[part]], np.uint16) if part in _SPECIAL else np.frombuffer(part, np.uint8)
            for part in parts
        ],
        dtype=np.uint16,
    )


def _batches(pieces: Iterable[tuple[bytes, bool, Path]]) -> Iterator[list[tuple[bytes, bool, Path]]]:
    batch: list[tuple[bytes, bool, Path]] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        held += len(piece[0])
        if held >= _BATCH:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
