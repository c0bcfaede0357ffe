"""All token ids of a list of files, in order and in bounded memory, and what is learnt of them as they pass."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ...core.errors import ConfigError
from . import arrays
from .documents import Tally, read_documents
from .encoding import Encoder
from .sources import SourceFile

_SAY_EVERY_S = 5.0


class TokenStream:
    """Iterate once, to the end; then tokens, largest, digest() and tally tell of all ids.

    encoder: needed where there are texts. dtype: the type of a single array; else uint16, or uint32 where the
    tokenizer's ids or the type of an array need more. progress: called with a line every few seconds.
    """

    def __init__(
        self, files: Sequence[SourceFile], encoder: Encoder | None, text_key: str, progress: Callable[[str], None]
    ) -> None:
        self._files, self._encoder, self._text_key, self._progress = files, encoder, text_key, progress
        types = [arrays.map_tokens(file.path).dtype for file in files if file.kind == "tokens"]
        if len(files) == len(types) == 1:
            self.dtype = types[0]
        else:
            types += [encoder.dtype] if encoder else []
            self.dtype = np.dtype("<u2" if max(kind.itemsize for kind in types) <= 2 else "<u4")
        self.tally, self.tokens, self.largest = Tally(), 0, -1
        self.approximate = encoder is not None and not encoder.bytes_only  # where long documents are cut
        self._hash = hashlib.blake2b(self.dtype.str.encode(), digest_size=16)

    def digest(self) -> str:
        """Of the ids and their type, in hexadecimal digits."""
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[np.ndarray]:
        """Arrays [n] of dtype. Raises ConfigError where an id does not fit, and for what the readers refuse."""
        most = np.iinfo(self.dtype).max
        total = sum(file.path.stat().st_size for file in self._files)
        started = said = time.monotonic()
        for ids, path in self._ids():
            largest = int(ids.max())
            if largest > most:
                raise ConfigError(
                    f"data: {path}: token id {largest} is beyond {most}, the most that the types of the sources and "
                    "the tokenizer allow; these arrays were made with another tokenizer"
                )
            ids = np.ascontiguousarray(ids, dtype=self.dtype)
            self.tokens += len(ids)
            self.largest = max(self.largest, largest)
            self._hash.update(ids.data)
            yield ids
            now = time.monotonic()
            if now - said >= _SAY_EVERY_S and self.tally.bytes_read:
                said, read = now, self.tally.bytes_read
                self._progress(
                    f"data: {read / 1e9:.2f} of {total / 1e9:.2f} GB read, {self.tokens:,} tokens, "
                    f"{(now - started) * max(0, total - read) / read:.0f} s left"
                )

    def _ids(self) -> Iterator[tuple[np.ndarray, Path | None]]:
        """(ids, the array they come from, if any); texts between two arrays are encoded together."""
        texts: list[SourceFile] = []
        for file in self._files:
            if file.kind != "tokens":
                texts.append(file)
                continue
            yield from self._encoded(texts)
            texts = []
            for chunk in arrays.chunks(arrays.map_tokens(file.path), file.path):
                yield chunk, file.path
                self.tally.bytes_read += chunk.nbytes
        yield from self._encoded(texts)

    def _encoded(self, texts: Sequence[SourceFile]) -> Iterator[tuple[np.ndarray, None]]:
        if self._encoder is not None:
            pieces = (
                (piece, last, file.path)
                for file in texts
                for piece, last in read_documents(file, self._text_key, self.tally)
            )
            for ids in self._encoder.encode(pieces, self.tally):
                yield ids, None
