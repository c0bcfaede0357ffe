"""`moe-launch bench experts --layer`: tokens/s through one expert layer of real size, beside its floors.

The layer is transformers' own DeepSeek-V3 experts class made expert-parallel, with random FP8 weights, and every
token goes through dispatch, experts and combine between ranks in shared memory. The floors are measured in the same
run on all ranks at once: the time to read the bytes of the hit experts once, and that of as many multiply-adds at the
rate of torch's bf16 matmul. Every measurement has a routing of its own, so that weights come from memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from ...core.errors import ConfigError, MoeRuntimeError
from ..machine import resident_bytes
from .model import machine_line
from .processes import Processes

SHAPE = ("experts", "hidden", "intermediate", "top_k")
_MATMUL_ROWS = 1024


# ---------------------------------------------------------------- one rank


class RankOfLayer:
    """One rank's part of the layer, and what can be measured on it."""

    def __init__(self, runtime: Any, experts: int, hidden: int, intermediate: int, top_k: int) -> None:
        import torch

        self.runtime, self.num_experts, self.hidden, self.top_k = runtime, experts, hidden, top_k
        model = model_of_one_layer(experts, hidden, intermediate, top_k)
        runtime._shard(model, None)
        self.layer = model.experts
        fill_fp8(self.layer, runtime.rank)
        self.matmul_weight = torch.randn(2 * intermediate, hidden).bfloat16()

    def routing(self, tokens: int, number: int) -> tuple[Any, Any, Any]:
        """This rank's share of a routing that every rank knows: (x, ids, weights)."""
        import torch

        rank, size = self.runtime.rank, self.runtime.size
        generator = torch.Generator().manual_seed(1000 * tokens + number)
        ids = torch.rand(tokens, self.num_experts, generator=generator).topk(self.top_k, dim=1).indices
        # One token is rank 0's.
        mine = slice(-(-tokens * rank // size), -(-tokens * (rank + 1) // size))
        x = torch.randn(tokens, self.hidden, generator=generator).bfloat16()
        weights = torch.rand(tokens, self.top_k, generator=generator)
        return x[mine], ids[mine], weights[mine]

    def forward(self, tokens: int, number: int) -> dict[str, float]:
        from ...comm.dispatch import IDLE, WORKING

        x, ids, weights = self.routing(tokens, number)
        state = WORKING if len(x) else IDLE
        before = self.layer.moe_runtime_layer.tokens_per_slot.copy()
        self.runtime.transport.barrier("bench")
        start = time.perf_counter()
        out = self.layer.exchange(x, ids, weights, state)
        seconds = time.perf_counter() - start
        rows = self.layer.moe_runtime_layer.tokens_per_slot - before
        self.hit = rows.nonzero()[0].tolist()
        return {
            "seconds": seconds,
            "hit": len(self.hit),
            "pairs": int(rows.sum()),
            "finite": bool(out.isfinite().all()),
        }

    def read(self) -> dict[str, float]:
        """Read the weights of the experts that the last forward hit."""
        import numpy as np
        import torch

        matrices = [weight.data.view(torch.uint8).flatten(1).numpy() for weight in self._weights()]
        self.runtime.transport.barrier("bench")
        start = time.perf_counter()
        for slot in self.hit:
            for matrix in matrices:
                row = matrix[slot]
                np.bitwise_xor.reduce(row[: len(row) // 8 * 8].view(np.uint64))
        return {"seconds": time.perf_counter() - start, "bytes": len(self.hit) * sum(len(m[0]) for m in matrices)}

    def matmul(self) -> dict[str, float]:
        """Seconds per multiply-add of torch's bf16 matmul."""
        import torch
        import torch.nn.functional as F

        x = torch.randn(_MATMUL_ROWS, self.hidden).bfloat16()
        self.runtime.transport.barrier("bench")
        start = time.perf_counter()
        F.linear(x, self.matmul_weight)
        return {"seconds": (time.perf_counter() - start) / (x.numel() * len(self.matmul_weight))}

    def _weights(self) -> list[Any]:
        return [self.layer.gate_up_proj, self.layer.down_proj]

    @property
    def products_per_pair(self) -> int:
        return sum(weight[0].numel() for weight in self._weights())


def model_of_one_layer(experts: int, hidden: int, intermediate: int, top_k: int) -> Any:
    """What sharding asks of a model, around transformers' own DeepSeek-V3 experts in bfloat16, on the meta device."""
    import torch
    from transformers import AutoConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    class Layer(torch.nn.Module):
        def forward(self) -> None: ...

        def generate(self) -> None: ...

    model = Layer()
    model.config = AutoConfig.for_model(
        "deepseek_v3",
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
    )
    with torch.device("meta"):
        model.experts = DeepseekV3Experts(model.config).to(torch.bfloat16)
    return model


def fill_fp8(layer: Any, seed: int) -> None:
    """Random FP8 weights with scales around 1e-2, attached as loading does with keep_fp8."""
    import numpy as np
    import torch

    from ...core.tensors import empty_weights
    from ...experts.blocks import BLOCK

    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 256, 1 << 24, dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # nan
    for name in ("gate_up_proj", "down_proj"):
        shape = getattr(layer, name).shape
        weight = empty_weights(shape, torch.uint8, torch.device("cpu"))
        flat = weight.view(-1).numpy()
        for begin in range(0, len(flat), len(codes) - 4096):  # another piece of the codes each time
            part = flat[begin : begin + len(codes) - 4096]
            first = int(generator.integers(4096))
            part[:] = codes[first : first + len(part)]
        blocks = [-(-extent // BLOCK) for extent in shape[1:]]
        scale = torch.from_numpy(generator.uniform(0.5e-2, 1.5e-2, (shape[0], *blocks)).astype(np.float32))
        for called, value in ((name, weight.view(torch.float8_e4m3fn)), (f"{name}_scale_inv", scale)):
            setattr(layer, called, torch.nn.Parameter(value, requires_grad=False))


def serve(shape: list[int], threads: int) -> int:
    """Runs on every rank: one measurement per line of stdin."""
    import torch

    import moe_runtime

    torch.set_num_threads(threads)
    with moe_runtime.init({"transport": "shm", "device": "cpu"}) as runtime, torch.inference_mode():
        rank = RankOfLayer(runtime, *shape)
        print(json.dumps({"describe": runtime.describe(), "products_per_pair": rank.products_per_pair}), flush=True)
        for line in sys.stdin:
            word, *numbers = line.split()
            if word == "memory":
                answer: dict[str, float] = {"peak_bytes": resident_bytes(peak=True)}
            else:
                answer = {"forward": rank.forward, "read": rank.read, "matmul": rank.matmul}[word](*map(int, numbers))
            print(json.dumps(answer), flush=True)
    return 0


# ---------------------------------------------------------------- all of them


def check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a layer that cannot be, or does not fit."""
    if arguments.experts < arguments.ranks:
        raise ConfigError(f"bench experts: --experts {arguments.experts} is less than one for each of the ranks")
    if arguments.top_k > arguments.experts:
        raise ConfigError(f"bench experts: --top-k {arguments.top_k} is more than there are experts")
    needed = arguments.experts * arguments.hidden * arguments.intermediate * 3 + arguments.ranks * (1 << 30)
    if needed > arguments.memory_gib << 30:
        raise ConfigError(
            f"bench experts: this layer needs about {needed / 2**30:.1f} GiB with what {arguments.ranks} ranks need "
            f"besides, more than --memory-gib {arguments.memory_gib}"
        )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure; `arguments` are those of `bench experts`. Raises ConfigError, or MoeRuntimeError when a rank fails."""
    check(arguments)
    print("filling the layer ...", file=sys.stderr, flush=True)
    shape = [getattr(arguments, name) for name in SHAPE]
    ranks = Processes("the layer", "expert_layer", arguments.ranks, arguments.threads, [arguments.threads, *shape])
    try:
        said = ranks.ready[0]
        for tokens in arguments.tokens:
            ranks.ask(f"forward {tokens} -1")  # buffers and threads are there from now on
        rounds: dict[int, list[dict[str, Any]]] = {tokens: [] for tokens in arguments.tokens}
        for number in range(arguments.passes):
            for tokens in arguments.tokens:
                print(f"pass {number + 1}/{arguments.passes}, {tokens} tokens ...", file=sys.stderr, flush=True)
                rounds[tokens].append(one_round(ranks, tokens, number, said["products_per_pair"]))
        peak = [answer["peak_bytes"] for answer in ranks.ask("memory")]
    finally:
        ranks.close()
    return {
        "machine": machine_line(),
        "ranks": arguments.ranks,
        "threads": arguments.threads,
        "shape": {name: getattr(arguments, name) for name in SHAPE},
        "describe": said["describe"],
        "peak_bytes": peak,
        "tokens": {tokens: summary(tokens, measured) for tokens, measured in rounds.items()},
    }


def one_round(ranks: Processes, tokens: int, number: int, products_per_pair: int) -> dict[str, Any]:
    """The slowest rank's seconds, and what the two floors would have taken for the busiest rank."""
    forward, read, matmul = ranks.ask(f"forward {tokens} {number}"), ranks.ask("read"), ranks.ask("matmul")
    if not all(answer["finite"] for answer in forward):
        raise MoeRuntimeError("bench experts: the layer's output is not finite")
    return {
        "seconds": max(answer["seconds"] for answer in forward),
        "hit": [answer["hit"] for answer in forward],
        "read_s": max(answer["seconds"] for answer in read),
        "read_bytes": sum(answer["bytes"] for answer in read),
        "multiply_s": max(f["pairs"] * products_per_pair * m["seconds"] for f, m in zip(forward, matmul, strict=True)),
    }


def summary(tokens: int, measured: list[dict[str, Any]]) -> dict[str, Any]:
    def median(values: list[float]) -> float:
        return statistics.median(values)

    return {
        "tokens_per_s": median([tokens / one["seconds"] for one in measured]),
        "seconds": median([one["seconds"] for one in measured]),
        "hit": measured[0]["hit"],
        "read_s": median([one["read_s"] for one in measured]),
        "read_gb_per_s": median([one["read_bytes"] / one["read_s"] / 1e9 for one in measured]),
        "multiply_s": median([one["multiply_s"] for one in measured]),
        "share_of_floor": median([max(one["read_s"], one["multiply_s"]) / one["seconds"] for one in measured]),
    }


def render(report: dict[str, Any]) -> str:
    shape = report["shape"]
    lines = [
        f"machine: {report['machine']}; {report['ranks']} ranks of {report['threads']} threads, shm",
        f"{shape['experts']} experts, hidden {shape['hidden']}, intermediate {shape['intermediate']}, "
        f"top-{shape['top_k']}, FP8; peak memory {sum(report['peak_bytes']) / 2**30:.1f} GiB in all ranks",
        *(line for line in report["describe"].splitlines() if line.startswith("expert compute")),
        f"{'tokens':>7}{'tokens/s':>10}{'ms':>10}{'experts hit':>16}{'reading them':>15}{'multiplying':>14}"
        "   share of the floor (ms; the later of the two is the floor)",
    ]
    for tokens, row in report["tokens"].items():
        lines.append(
            f"{tokens:>7}{row['tokens_per_s']:>10.2f}{row['seconds'] * 1e3:>10.1f}"
            f"{'+'.join(map(str, row['hit'])):>16}{row['read_s'] * 1e3:>15.1f}{row['multiply_s'] * 1e3:>14.1f}"
            f"{row['share_of_floor']:>10.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(serve([int(word) for word in sys.argv[2:]], int(sys.argv[1])))
