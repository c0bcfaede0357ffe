"""`bench train`'s expert layer: forward and backward through moe-runtime and through DeepSpeed's MoE, if it is there.

Both live in the same ranks, have the same weights and take turns on the same tokens. The router is DeepSpeed's in both
(softmax of logits in float32, the top-k made to add up to 1); DeepSpeed drops no token (`drop_tokens=False`: each
expert's capacity is the largest number of tokens that any expert got).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

import moe_runtime

from ...core.errors import MoeRuntimeError
from ..machine import free_port
from .expert_layer import model_of_one_layer
from .processes import Processes, spread

OURS, DEEPSPEED = "moe-runtime", "DeepSpeed"
MISSING = "not measured: deepspeed is not installed; pip install wheel && pip install --no-build-isolation deepspeed"
_TOLERANCE = 0.01  # of norms: both round to bf16, in different places


# ---------------------------------------------------------------- one rank


class Expert(torch.nn.Module):
    """DeepSeek's expert as DeepSpeed takes it: down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up = torch.nn.Linear(hidden, 2 * intermediate, bias=False)
        self.down = torch.nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Ours(torch.nn.Module):
    """DeepSpeed's router, and transformers' DeepSeek-V3 experts made expert-parallel."""

    def __init__(self, runtime: Any, shape: list[int]) -> None:
        super().__init__()
        self.top_k = shape[3]
        model = model_of_one_layer(*shape)
        runtime._shard(model, None)
        self.experts, self.router = model.experts, torch.nn.Parameter(torch.empty(shape[0], shape[1]))
        state = self.experts.moe_runtime_layer
        self.mine = state.placement.rank_experts(state.index, runtime.rank)
        for name, parameter in list(self.experts.named_parameters()):
            empty = torch.empty(len(self.mine), *parameter.shape[1:], dtype=torch.bfloat16)
            setattr(self.experts, name, torch.nn.Parameter(empty))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = F.linear(x.float(), self.router.float()).softmax(-1)
        weights, ids = scores.topk(self.top_k, dim=-1)
        return self.experts(x, ids, weights / weights.sum(-1, keepdim=True))


class LayerRank:
    """Both layers with the same random bf16 weights, and what can be measured on them."""

    def __init__(self, port: int, shape: list[int]) -> None:
        import deepspeed
        from deepspeed.moe.layer import MoE

        experts, self.hidden, intermediate, top_k = shape
        self.runtime = moe_runtime.init({"transport": "shm", "device": "cpu"})
        rank, size = self.runtime.rank, self.runtime.size
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
        deepspeed.init_distributed("gloo", verbose=False)  # over the group that is there
        ours = Ours(self.runtime, shape)
        theirs = MoE(
            self.hidden,
            Expert(self.hidden, intermediate),
            experts,
            ep_size=size,
            k=top_k,
            drop_tokens=False,
            top2_2nd_expert_sampling=False,
        ).bfloat16()
        theirs.set_deepspeed_parallelism()
        self.layers = {OURS: ours, DEEPSPEED: theirs}
        generator = torch.Generator().manual_seed(0)
        router = torch.randn(experts, self.hidden, generator=generator).mul_(0.02).bfloat16()
        ours.router.data, theirs.deepspeed_moe.gate.wg.weight.data = router, router.clone()
        copies = theirs.deepspeed_moe.experts.deepspeed_experts
        for expert in range(experts):
            gate_up = torch.randn(2 * intermediate, self.hidden, generator=generator).mul_(0.02).bfloat16()
            down = torch.randn(self.hidden, intermediate, generator=generator).mul_(0.02).bfloat16()
            if expert in ours.mine:
                slot = ours.mine.index(expert)
                ours.experts.gate_up_proj.data[slot], ours.experts.down_proj.data[slot] = gate_up, down
            if expert // len(copies) == rank:
                copy = copies[expert % len(copies)]
                copy.gate_up.weight.data, copy.down.weight.data = gate_up, down

    def step(self, name: str, tokens: int, number: int) -> dict[str, float]:
        """Seconds of forward and backward of `tokens` tokens of this rank, and norms that tell what was computed."""
        generator = torch.Generator().manual_seed(1000 * number + self.runtime.rank)
        x = torch.randn(tokens, self.hidden, generator=generator).bfloat16().requires_grad_()
        grad = torch.randn(tokens, self.hidden, generator=generator).bfloat16()
        layer = self.layers[name]
        layer.zero_grad(set_to_none=True)
        self.runtime.transport.barrier("bench")
        start = time.perf_counter()
        out = layer(x)
        out = out[0] if isinstance(out, tuple) else out
        middle = time.perf_counter()
        out.backward(grad)
        self.runtime.transport.barrier("bench")
        end = time.perf_counter()
        weights = [p.grad.float().norm() for p in layer.parameters() if p.grad is not None]
        return {
            "forward_s": middle - start,
            "step_s": end - start,
            "output_norm": float(out.detach().float().norm()),
            "input_gradient_norm": float(x.grad.float().norm()),
            "weight_gradient_norm": float(torch.stack(weights).norm()),
        }


def main() -> int:
    """Runs on every rank: one measurement per line of stdin, [subject, tokens, number]."""
    torch.set_num_threads(1)
    rank = LayerRank(int(sys.argv[1]), [int(word) for word in sys.argv[2:]])
    print(json.dumps({"ready": rank.runtime.describe()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(rank.step(*json.loads(line))), flush=True)
    return 0


# ---------------------------------------------------------------- all of them


def compare(ranks: int, shape: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of forward and backward of one expert layer. shape: experts, hidden, intermediate, top-k; tokens: of
    each rank. {"skipped": why} where deepspeed is not there; MoeRuntimeError where the two do not compute the same.
    """
    if importlib.util.find_spec("deepspeed") is None:
        return {"skipped": MISSING}
    processes = Processes("the expert layer", "train_layer", ranks, 1, [free_port(), *shape])
    steps: dict[str, list[list[dict[str, float]]]] = {OURS: [], DEEPSPEED: []}
    try:
        for number in range(rounds + 1):
            for name, answers in steps.items():
                answers.append(processes.ask(json.dumps([name, tokens, number])))
            _check_equal(*(answers[-1] for answers in steps.values()))
    finally:
        processes.close()
    rows, ours = {}, [max(answer["step_s"] for answer in answers) for answers in steps[OURS][1:]]
    for name, measured in steps.items():
        seconds = [max(answer["step_s"] for answer in answers) for answers in measured[1:]]
        rows[name] = {
            "step_s": spread(seconds),
            "forward_s": statistics.median(max(answer["forward_s"] for answer in answers) for answers in measured[1:]),
            "this_over_ours": spread([theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]),
        }
    return {
        "experts, hidden, intermediate, top-k": shape,
        "tokens_per_rank": tokens,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "subjects": rows,
    }


def _check_equal(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    for rank, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for what in (key for key in mine if key.endswith("_norm")):
            if not abs(other[what] - mine[what]) <= _TOLERANCE * mine[what]:
                raise MoeRuntimeError(
                    f"bench train: rank {rank}: {DEEPSPEED} has {what} {other[what]:.5f}, {OURS} {mine[what]:.5f}; "
                    "they do not compute the same"
                )


def render(report: dict[str, Any]) -> str:
    if "skipped" in report:
        return f"one expert layer beside DeepSpeed's MoE: {report['skipped']}"
    experts, hidden, intermediate, top_k = report["experts, hidden, intermediate, top-k"]
    lines = [
        f"one expert layer beside DeepSpeed {report['deepspeed']}'s MoE: {experts} experts, hidden {hidden}, "
        f"intermediate {intermediate}, top-{top_k}, {report['tokens_per_rank']} tokens a rank; forward and backward",
    ]
    for name, row in report["subjects"].items():
        step, ratio = row["step_s"], row["this_over_ours"]
        lines.append(
            f"{name:17s}{step['median'] * 1e3:>8.0f} ms ({step['min'] * 1e3:.0f} to {step['max'] * 1e3:.0f}), of which "
            f"forward {row['forward_s'] * 1e3:.0f}; this / ours {ratio['median']:.2f} "
            f"({ratio['min']:.2f} to {ratio['max']:.2f})"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
