"""Sources to one memory-mapped array of token ids: tokenised once into a cache file, mapped from then on.

An entry of the cache is KEY.bin, the ids, and KEY.json, what is known about them; it counts once the second is there.
The key stands for names, sizes and times of the files and for the tokenizer, so a change of any makes a new entry.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...core.environment import user_cache_folder
from ...core.errors import ConfigError
from ...core.files import write_atomically
from . import arrays
from .encoding import Encoder
from .sources import SourceFile, find_files
from .stream import TokenStream

_FORMAT = 1  # goes up when the same input would give other ids, or an entry is written otherwise


@dataclass(frozen=True)
class _Facts:
    """KEY.json."""

    dtype: str
    tokens: int
    largest: int
    digest: str
    files: int
    documents: int
    binary: int
    not_utf8: int
    in_pieces: int


class Corpus:
    """Token ids and what is known about them.

    tokens: [N] memory-mapped, read-only; uint16 or uint32 by vocabulary, or as in the one array that is used in place.
    digest: of the ids and their type: ranks with equal digests see the same data, wherever their files lie.
    """

    def __init__(self, tokens: np.ndarray, facts: _Facts, source: str) -> None:
        self.tokens, self.digest = tokens, facts.digest
        self._facts, self._source = facts, source

    def describe(self) -> str:
        """One line: tokens, documents, files, where they came from, what was skipped or changed."""
        facts = self._facts
        notes = {
            "documents": facts.documents,
            f"files, {self._source}": facts.files,
            "binary files skipped": facts.binary,
            "files not UTF-8, bad bytes replaced": facts.not_utf8,
            "long documents encoded in pieces (tokens at the cuts may differ)": facts.in_pieces,
        }
        told = [f"{count:,} {words}" for words, count in notes.items() if count]
        return "; ".join([f"data: {facts.tokens:,} tokens ({self.tokens.dtype})", *told])

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ConfigError when there is an id that a model of `vocab_size` has no embedding for."""
        if self._facts.largest < vocab_size:
            return
        for begin in range(0, len(self.tokens), arrays.CHUNK):
            chunk = self.tokens[begin : begin + arrays.CHUNK]
            if (large := chunk >= vocab_size).any():
                position = int(np.argmax(large))
                raise ConfigError(
                    f"data: token {begin + position:,} is {chunk[position]}, but the model's vocab_size is "
                    f"{vocab_size}: the tokenizer does not match the model; use the model's own tokenizer, "
                    f"or set vocab_size to at least {self._facts.largest + 1}"
                )


def open_corpus(
    sources: Sequence[str],
    base: Path,
    tokenizer: Any,
    *,
    text_key: str = "text",
    cache: Path | None = None,
    progress: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Corpus:
    """The tokens of `sources` (see find_files), in their order, an end-of-text token after each document.

    tokenizer: a Hugging Face tokenizer, or None where all sources are token arrays. text_key: where JSONL keeps its
    text. cache: folder of the token files; None: moe_runtime/tokens in the user's cache folder. progress: called with a
    line every few seconds while tokens are made. One .npy or .bin as the only source is mapped where it lies, and read
    through once; all else is copied into the cache. A second call with unchanged files only maps, so on a host let one
    rank call it first. Raises ConfigError for sources, files and tokenizers that cannot be used.
    """
    files = find_files(sources, base)
    texts = [file for file in files if file.kind != "tokens"]
    encoder = Encoder(tokenizer) if texts else None
    folder = user_cache_folder() / "moe_runtime" / "tokens" if cache is None else Path(cache)
    key = _key(files, encoder.identity if encoder else "", text_key)
    record = folder / f"{key}.json"
    if len(files) == 1 and not texts:
        facts, source = _read_record(record), "used in place"
        tokens = arrays.map_tokens(files[0].path)
        if facts is None:
            facts = _make(TokenStream(files, None, text_key, progress), len(files), record, None)
        return Corpus(tokens, facts, source)
    path = folder / f"{key}.bin"
    facts, source = _read_record(record), f"from the cache {path}"
    if facts is None or not _is_whole(path, facts):
        facts = _make(TokenStream(files, encoder, text_key, progress), len(files), record, path)
        source = "tokenised now" if texts else "joined now"
    return Corpus(np.memmap(path, facts.dtype, "r", shape=(facts.tokens,)), facts, source)


def _make(stream: TokenStream, files: int, record: Path, path: Path | None) -> _Facts:
    """Read all ids through once; write them to `path`, if any, and then what is known about them to `record`."""

    def write(file: IO[bytes]) -> None:
        for ids in stream:
            file.write(ids.data)
        if not stream.tokens:
            hint = "; to use token arrays, name or match them, as FOLDER/*.npy" if stream.tally.binary else ""
            raise ConfigError(f"data: the sources hold no text ({stream.tally.binary} binary files skipped{hint})")

    try:
        record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"data: cannot keep tokens in {record.parent} ({error.strerror}); set XDG_CACHE_HOME to a folder that "
            "can be written"
        ) from None
    if path is None:
        for _ in stream:
            pass
    else:
        write_atomically(path, write)
    tally = stream.tally
    facts = _Facts(
        dtype=stream.dtype.str,
        tokens=stream.tokens,
        largest=stream.largest,
        digest=stream.digest(),
        files=files - tally.binary,
        documents=tally.documents,
        binary=tally.binary,
        not_utf8=len(tally.not_utf8),
        in_pieces=tally.in_pieces if stream.approximate else 0,
    )
    text = json.dumps(asdict(facts), indent=1).encode()
    write_atomically(record, lambda file: file.write(text))
    return facts


def _key(files: Iterable[SourceFile], tokenizer: str, text_key: str) -> str:
    rows = []
    for file in files:
        try:
            stat = file.path.stat()
        except OSError as error:
            raise ConfigError(f"data: {file.path}: cannot read it ({error.strerror})") from None
        rows.append([str(file.path), file.kind, file.named, stat.st_size, stat.st_mtime_ns])
    text = json.dumps([_FORMAT, tokenizer, text_key, rows])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read_record(record: Path) -> _Facts | None:
    """None where there is none, or none that this version wrote: the entry is then made again."""
    try:
        facts = _Facts(**json.loads(record.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return facts if isinstance(facts.tokens, int) and isinstance(facts.largest, int) else None


def _is_whole(path: Path, facts: _Facts) -> bool:
    width = {"<u2": 2, "<u4": 4}.get(facts.dtype, 0)
    try:
        return width * facts.tokens == path.stat().st_size > 0
    except OSError:
        return False
