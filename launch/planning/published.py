"""What this package's way of counting predicts, beside figures that others have published for their own hardware.

`python -m moe_runtime.launch.planning.published` prints the tables of docs/planning.md. Predicted: bytes over
bandwidth, weights over memory bandwidth, multiply-adds over a rate; no latency, no attention, nothing fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

from .rates import HOME_BYTES, OUT_BYTES
from .shape import EXPERT_BYTES

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS = 7168, 2048, 256, 8, 58  # DeepSeek-V3
EXPERT_WEIGHTS = 3 * HIDDEN * INTERMEDIATE
FP8_ROW, BF16_ROW = HIDDEN * OUT_BYTES, HIDDEN * HOME_BYTES
GPUS_PER_NODE = 8

# Of an H800 node, as DeepEP's README gives them: NVLink and a 400 Gb/s card per GPU.
NVLINK, RDMA = 160e9, 50e9
# Reached by FP8 grouped matmuls, and by reading weights: assumed, 60 % and 80 % of 1,979 TFLOP/s and 3.35 TB/s.
FLOPS, MEMORY = 0.6 * 1979e12, 0.8 * 3.35e12

# DeepEP's README, low-latency kernels on H800, 128 tokens per rank, top-8: ranks -> microseconds.
DEEPEP_DISPATCH = {8: 77, 16: 118, 32: 155, 64: 173, 128: 192, 256: 194}
DEEPEP_COMBINE = {8: 114, 16: 195, 32: 273, 64: 314, 128: 369, 256: 360}


def low_latency_us(ranks: int, row_bytes: float, tokens: int = 128) -> float:
    """Microseconds until a rank's rows are out, one for each selected expert: those to its own node over NVLink, those
    to others over RDMA, at the same time."""
    elsewhere = max(0.0, 1 - GPUS_PER_NODE / ranks)
    sent = tokens * TOP_K * row_bytes
    return max(sent * (1 - elsewhere) / NVLINK, sent * elsewhere / RDMA) * 1e6


@dataclass(frozen=True)
class Serving:
    """Published tokens per second and node of a whole model, and what they were reached with."""

    what: str
    tokens_per_rank: int  # at once
    ranks: int
    slots: int
    published: float
    is_decode: bool = False


SERVING = (
    Serving("DeepSeek's profile, prefill", 16384, 32, 288, 62_713),
    Serving("SGLang, prefill of 2K inputs", 16384, 32, 288, 54_543),
    Serving("DeepSeek's profile, decode", 128, 128, 288, 18_598, True),
    Serving("SGLang, decode of 2K inputs", 256, 72, 288, 22_282, True),
)


def expert_seconds(serving: Serving) -> float:
    """Of one layer's routed experts on a balanced rank: multiply-adds, and reading each of its experts once."""
    rows = serving.tokens_per_rank * TOP_K
    return max(
        2 * EXPERT_WEIGHTS * rows / FLOPS, serving.slots / serving.ranks * EXPERT_WEIGHTS * EXPERT_BYTES["fp8"] / MEMORY
    )


def exchange_seconds(serving: Serving) -> float:
    """Of one layer's dispatch (FP8) and combine (bf16). Decode: a row per selected expert; prefill: one per node, of
    at most four, as the group-limited gate has it."""
    if serving.is_decode:
        each = (low_latency_us(serving.ranks, row, serving.tokens_per_rank) for row in (FP8_ROW, BF16_ROW))
        return sum(each) * 1e-6
    nodes = serving.ranks // GPUS_PER_NODE
    crossings = min(nodes, 4) * (1 - 1 / nodes)
    return serving.tokens_per_rank * crossings * (FP8_ROW + BF16_ROW) / RDMA


def tokens_per_second(serving: Serving) -> tuple[float, float]:
    """Tokens per second and node of the expert layers alone: (one after the other, exchange hidden behind compute)."""
    compute, exchange = expert_seconds(serving), exchange_seconds(serving)
    tokens = serving.tokens_per_rank * GPUS_PER_NODE
    return tokens / (LAYERS * (compute + exchange)), tokens / (LAYERS * max(compute, exchange))


def tables() -> str:
    lines = ["| ranks | dispatch, predicted us | published | | combine, predicted us | published | |", "|---" * 7 + "|"]
    for ranks, dispatch in DEEPEP_DISPATCH.items():
        out, home = low_latency_us(ranks, FP8_ROW), low_latency_us(ranks, BF16_ROW)
        combine = DEEPEP_COMBINE[ranks]
        cells = [f"{ranks}", f"{out:.0f}", f"{dispatch}", f"{out / dispatch:.2f}"]
        cells += [f"{home:.0f}", f"{combine}", f"{home / combine:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| tokens/s per node of 8 | expert layers, predicted | exchange hidden, predicted | published, whole model "
        "| published / predicted |",
        "|---" * 5 + "|",
    ]
    for serving in SERVING:
        after, hidden = tokens_per_second(serving)
        lines.append(
            f"| {serving.what} | {after:,.0f} | {hidden:,.0f} | {serving.published:,.0f} "
            f"| {serving.published / after:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
