"""Documents from text files and JSONL, in pieces of bounded size: a file larger than memory is only ever a stream."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ...core.errors import ConfigError
from .sources import SourceFile

PIECE = 1 << 20  # bytes, before the last line end is looked for
_LOOKED_AT = 8192  # bytes in which a zero tells a binary file, as in git


@dataclass
class Tally:
    """What the readers saw, for the user to be told."""

    documents: int = 0
    binary: int = 0  # files skipped
    in_pieces: int = 0  # documents of more than one piece
    not_utf8: set[str] = field(default_factory=set)  # files
    bytes_read: int = 0


def read_documents(file: SourceFile, text_key: str, tally: Tally) -> Iterator[tuple[bytes, bool]]:
    """(piece, whether its document ends with it) for all documents of a text or JSONL file; empty ones are left out.

    Pieces are cut at line ends where there are any, never inside a character of UTF-8. Raises ConfigError for a file
    that cannot be read, a binary file that was named, and a line that is no object with a string under `text_key`.
    """
    try:
        with file.path.open("rb") as stream:
            texts = _json_texts(stream, file.path, text_key) if file.kind == "jsonl" else _one_text(stream, file, tally)
            before = tally.bytes_read
            for text in texts:
                for piece in _marked(_pieces(text), tally):
                    tally.bytes_read = before + stream.tell()
                    yield piece
            tally.bytes_read = before + file.path.stat().st_size
    except OSError as error:
        raise ConfigError(f"data: {file.path}: cannot read it ({error.strerror or error})") from None


def decoded(piece: bytes, path: Path, tally: Tally) -> str:
    """The piece as text; where it is not UTF-8, with U+FFFD, and the file is counted."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        tally.not_utf8.add(str(path))
        return piece.decode("utf-8", errors="replace")


def _one_text(stream: IO[bytes], file: SourceFile, tally: Tally) -> Iterator[IO[bytes]]:
    if b"\0" not in stream.read(_LOOKED_AT):
        stream.seek(0)
        yield stream
    elif file.named:
        raise ConfigError(
            f"data: {file.path} is a binary file (it has zero bytes); text must be UTF-8, not compressed, "
            "and token ids must be in a .npy or .bin file"
        )
    else:
        tally.binary += 1


def _json_texts(stream: IO[bytes], path: Path, text_key: str) -> Iterator[IO[bytes]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        where = f"data: {path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:  # of UTF-8 and of JSON
            raise ConfigError(f"{where}: no JSON ({error})") from None
        text = row.get(text_key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            seen = f"its keys: {', '.join(sorted(row)[:8])}" if isinstance(row, dict) else "it is no object"
            raise ConfigError(f"{where}: no object with a string under {text_key!r} ({seen})")
        yield io.BytesIO(text.encode("utf-8", errors="replace"))  # JSON can spell half a character: it becomes "?"


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    rest = stream.read(PIECE)
    while block := stream.read(PIECE):
        cut = rest.rfind(b"\n") + 1 or _character_start(rest)
        yield rest[:cut]
        rest = rest[cut:] + block
    yield rest


def _character_start(data: bytes) -> int:
    """Where the last character of `data` starts; its end if that is no UTF-8."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] & 0b1100_0000 != 0b1000_0000:
            return len(data) - back or len(data)
    return len(data)


def _marked(pieces: Iterator[bytes], tally: Tally) -> Iterator[tuple[bytes, bool]]:
    before = next(pieces)
    if not before:
        return
    tally.documents += 1
    for count, piece in enumerate(pieces):
        tally.in_pieces += count == 0
        yield before, False
        before = piece
    yield before, True
