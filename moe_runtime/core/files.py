"""Writing a file so that it appears whole or not at all, and is on disk; what damaged ones raise."""

from __future__ import annotations

import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from tokenize import TokenError
from typing import IO

from .errors import ConfigError

# What numpy and zipfile raise for arrays and archives that are none: a header is read as Python's literals.
BROKEN_ARRAY = (
    EOFError, KeyError, MemoryError, NotImplementedError, OverflowError, RuntimeError, SyntaxError, TokenError,
    TypeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Calls `write` with a file beside `path`, then gives it that name. Raises ConfigError when it cannot."""
    path = Path(path)
    try:
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ConfigError(f"{path}: cannot write here ({error.strerror}); check the folder") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the file ({error.strerror})") from None
    finally:
        Path(unfinished).unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
