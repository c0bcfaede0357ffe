"""Windows of tokens for each rank as a function of the step: no state to save, and no dependence on how many ranks."""

from __future__ import annotations

import numpy as np
import torch

from ...core.errors import ConfigError
from .order import shuffled


class Batches:
    """Windows of `sequence_length` + 1 tokens in a shuffled order that depends on the seed alone.

    Step s takes the windows s * batch_size ... of the order; every rank gets its own run of them, as equal as
    possible, so the joined batch is the same for any number of ranks, and a run goes on where another stopped by
    asking for its step. Windows in `held_out` (of the function of that name) never come. windows: how many
    make an epoch.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        sequence_length: int,
        batch_size: int,
        seed: int,
        held_out: np.ndarray | None = None,
    ) -> None:
        self._tokens, self._length, self._batch, self._seed = tokens, sequence_length, batch_size, seed
        out = np.zeros(0, np.int64) if held_out is None else held_out
        # Training window i lies behind as many held-out ones as have at most i training windows before them.
        self._before = out - np.arange(len(out))
        self.windows = count_windows(tokens, sequence_length) - len(out)
        if self.windows < batch_size:
            without = f" besides {len(out)} held out" if len(out) else ""
            raise ConfigError(
                f"data: {len(tokens)} tokens make {self.windows} sequences of {sequence_length}{without}, "
                f"fewer than one batch of {batch_size}; add data, or lower sequence_length or batch_size"
            )

    def of_rank(self, step: int, rank: int, size: int) -> torch.Tensor:
        """[sequences of this rank, sequence_length + 1] int64 token ids; may have no row."""
        first, last = self._batch * rank // size, self._batch * (rank + 1) // size
        number = shuffled(np.arange(first, last) + step * self._batch, self.windows, self._seed)
        return cut(self._tokens, number + np.searchsorted(self._before, number, side="right"), self._length)


class ValidationBatches:
    """Windows in a fixed order, each once; the rest of the tokens, less than a window, is left out.

    windows: their numbers, of held_out; None: all of `tokens`. at_most: of more than that, so many that lie evenly.
    Every rank makes `steps` passes, as expert layers need all ranks, and gets its share of each batch: the last batch
    may be short, a rank's share empty. sequences: how many windows there are; each predicts sequence_length tokens.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        sequence_length: int,
        batch_size: int,
        windows: np.ndarray | None = None,
        at_most: int | None = None,
    ) -> None:
        count = count_windows(tokens, sequence_length) if windows is None else len(windows)
        if not count:
            raise ConfigError(
                f"data: {len(tokens)} tokens for validation make no sequence of {sequence_length}; "
                "add data, or lower sequence_length"
            )
        self.sequences = count if at_most is None else min(count, at_most)
        self.steps = -(-self.sequences // batch_size)
        number = evenly(self.sequences, count)
        self._numbers = number if windows is None else windows[number]
        self._tokens, self._length, self._batch = tokens, sequence_length, batch_size

    def of_rank(self, step: int, rank: int, size: int) -> torch.Tensor:
        """Pass `step` of `steps`: [sequences of this rank, sequence_length + 1] int64 token ids; may have no row."""
        batch = self._numbers[step * self._batch : (step + 1) * self._batch]
        first, last = len(batch) * rank // size, len(batch) * (rank + 1) // size
        return cut(self._tokens, batch[first:last], self._length)


def held_out(tokens: np.ndarray, sequence_length: int, fraction: float) -> np.ndarray:
    """Numbers of the windows to validate on, ascending, spread evenly over the tokens: int64 [at least 1].

    What such a window predicts, no other window predicts: a neighbour shares one token, which it only reads or only
    predicts. Neighbours may be of the same document; for a test on unseen documents give sources of their own.
    Raises ConfigError for a fraction that is not between 0 and 1, or tokens that do not make two windows.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"data: the fraction held out for validation must be between 0 and 1, got {fraction!r}")
    count = count_windows(tokens, sequence_length)
    if count < 2:
        raise ConfigError(
            f"data: {len(tokens)} tokens make {count} sequences of {sequence_length}; "
            "none can be held out for validation"
        )
    return evenly(min(count - 1, max(1, round(fraction * count))), count)


def count_windows(tokens: np.ndarray, sequence_length: int) -> int:
    """Windows of sequence_length + 1 tokens that share one token with the next."""
    return max(0, len(tokens) - 1) // sequence_length


def evenly(some: int, count: int) -> np.ndarray:
    """`some` of the numbers below `count`, ascending, each in the middle of an equal part: int64 [some]."""
    return (2 * np.arange(some, dtype=np.int64) + 1) * count // (2 * some)


def cut(tokens: np.ndarray, windows: np.ndarray, sequence_length: int) -> torch.Tensor:
    """int64 [n, sequence_length + 1] of windows [n]."""
    rows = np.empty((len(windows), sequence_length + 1), np.int64)
    for row, window in zip(rows, windows, strict=True):
        row[:] = tokens[int(window) * sequence_length :][: sequence_length + 1]
    return torch.from_numpy(rows)
