"""Training text as one array of tokens, and batches that do not depend on the number of ranks."""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..core.errors import ConfigError
from .tokenizers import END_OF_TEXT

PYTHON_STANDARD_LIBRARY = "python-standard-library"
_NOT_STANDARD = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def text_files(sources: Sequence[str], base: Path) -> list[Path]:
    """The files that `sources` name, sorted: paths or globs (relative ones to `base`), or "python-standard-library".

    Raises ConfigError for a source that matches nothing.
    """
    found: list[Path] = []
    for source in sources:
        if source == PYTHON_STANDARD_LIBRARY:
            root = Path(sysconfig.get_path("stdlib"))
            files = [p for p in root.rglob("*.py") if not _NOT_STANDARD.intersection(p.relative_to(root).parts)]
        else:
            path = base / source  # an absolute source leaves `base` out
            matches = [path] if path.is_file() else map(Path, glob.glob(str(path), recursive=True))
            files = [match for match in matches if match.is_file()]
        if not files:
            raise ConfigError(f"data: {source!r} matches no file (looked in {base})")
        found += sorted(files)
    return found


def byte_tokens(files: Sequence[Path]) -> np.ndarray:
    """All files as byte tokens, an end-of-text token after each: int16 [tokens]."""
    parts = []
    for path in files:
        parts += [np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int16), np.array([END_OF_TEXT], np.int16)]
    return np.concatenate(parts)


class Batches:
    """Windows of `sequence_length` + 1 tokens in a shuffled order that depends on the seed alone.

    Step s takes the windows s * batch_size ... of the order; every rank gets its own run of them, as equal as
    possible, so the joined batch is the same for any number of ranks.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, batch_size: int, seed: int) -> None:
        self._tokens, self._length, self._batch = tokens, sequence_length, batch_size
        self._windows = (len(tokens) - 1) // sequence_length
        self._seed = seed
        if self._windows < batch_size:
            raise ConfigError(
                f"data: {len(tokens)} tokens make {self._windows} sequences of {sequence_length}, "
                f"fewer than one batch of {batch_size}"
            )

    def of_rank(self, step: int, rank: int, size: int) -> torch.Tensor:
        """[sequences of this rank, sequence_length + 1] int64 token ids; may have no row."""
        first, last = self._batch * rank // size, self._batch * (rank + 1) // size
        rows = [self._window(step * self._batch + position) for position in range(first, last)]
        return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(len(rows), self._length + 1))

    def _window(self, position: int) -> np.ndarray:
        epoch, within = divmod(position, self._windows)
        start = int(self._order(epoch)[within]) * self._length
        return self._tokens[start : start + self._length + 1]

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(self._windows)
        return self._permutation
