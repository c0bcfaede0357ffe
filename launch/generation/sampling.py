"""Which token comes next: pure functions of logits and of (seed, the request's line, the token's index).

A token is the argmax of (scores + Gumbel noise), which samples from softmax(scores). The noise of a token depends on
nothing else, so neither on ranks nor on what runs in the same batch. Where rounding differs a little, so does the
result only if two tokens are that close: adding up probabilities and comparing with one uniform number, the usual
way, would let the rounding of every token before it decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

_64_BITS = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def choose(logits_BV: torch.Tensor, sampling: Sampling, drawn: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The next token [B] int64 of each row. logits_BV: [B, V] float32 on the CPU. drawn: each row's (line, index)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    scores_BV = restrict(logits_BV, sampling)
    noise_BV = np.stack([gumbel(sampling.seed, line, index, logits_BV.shape[1]) for line, index in drawn])
    return (scores_BV.double() + torch.from_numpy(noise_BV)).argmax(-1)


def restrict(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Scores [B, V]: tempered, and -inf where top-k or top-p excludes a token, by transformers' own processors."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors(None, logits_BV)


def gumbel(seed: int, line: int, index: int, size: int) -> np.ndarray:
    """[size] float64 noise; from Philox's raw bits, which numpy promises to keep, so alike on all hosts."""
    bits = np.random.Philox(key=(line << 64) | (seed & _64_BITS), counter=index << 192)
    uniform = ((bits.random_raw(size) >> np.uint64(11)) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def log_probabilities(logits_BV: torch.Tensor, tokens_B: torch.Tensor) -> list[float]:
    """log softmax of the untempered float32 logits [B, V] at each row's token."""
    return logits_BV.log_softmax(-1).gather(1, tokens_B.view(-1, 1)).view(-1).tolist()
