"""One rank of `bench balance`: the same expert layer under several placements, and the whole of it without exchange."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import numpy as np
import torch

import moe_runtime

from ...comm.dispatch import WORKING
from ...comm.rows import combine_rows
from ...core.placement import Placement
from ...experts import placement as placements
from ...experts.compute import grouped_experts
from ...recorder import Recorder
from .expert_layer import model_of_one_layer

SUBJECTS = ("even", "by speed", "planned", "planned, balanced")
_PLANNED_ON = 16  # batches


class BalanceRank:
    """A DeepSeek-V3 expert layer with random bf16 weights, and what can be measured on it."""

    def __init__(self, cluster: str, slots: int, shape: list[int]) -> None:
        self.shape = shape
        self.num_experts, self.hidden, _, self.top_k = shape
        self.slots = slots
        self.runtime = moe_runtime.init({"transport": "shm", "device": "cpu", "cluster": cluster})
        self.slowdown = self.runtime._slowdown
        self.whole = model_of_one_layer(*shape).experts
        generator = torch.Generator().manual_seed(0)  # the same weights on every rank
        for name, parameter in list(self.whole.named_parameters()):
            weight = torch.randn(parameter.shape, generator=generator).mul_(0.02).to(torch.bfloat16)
            setattr(self.whole, name, torch.nn.Parameter(weight, requires_grad=False))
        self.layers: dict[str, Any] = {}
        self.models: dict[str, Any] = {}

    def batch(self, tokens: int, skew: float, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x, ids, weights) of all ranks' tokens; experts' popularity follows Zipf's law of exponent `skew`."""
        generator = torch.Generator().manual_seed(number)
        popular = torch.randperm(self.num_experts, generator=torch.Generator().manual_seed(1)).double()
        noise = -torch.empty(tokens, self.num_experts, dtype=torch.float64).exponential_(generator=generator).log()
        ids = (noise - skew * (popular + 1).log()).topk(self.top_k, dim=1).indices
        x = torch.randn(tokens, self.hidden, generator=generator).bfloat16()
        return x, ids, torch.rand(tokens, self.top_k, generator=generator)

    def place(self, tokens: int, skew: float, rates: list[float]) -> dict[str, Any]:
        """Make the layer of every subject. rates: tokens/s of each rank alone. The load is that of other batches."""
        batches = (self.batch(tokens, skew, 10_000 + number)[1] for number in range(_PLANNED_ON))
        load = sum(np.bincount(ids.reshape(-1), minlength=self.num_experts) for ids in batches)[None]
        ranks = [placements.Rank(1 / rate) for rate in rates]
        planned = placements.plan(load, ranks, self.slots)
        made: dict[str, tuple[Placement, str]] = {
            "even": (placements.proportional(1, self.num_experts, [1.0] * len(rates)), "static"),
            "by speed": (placements.proportional(1, self.num_experts, rates), "static"),
            "planned": (planned, "static"),
            "planned, balanced": (planned, "balanced"),
        }
        for name, (placement, choice) in made.items():
            # One runtime per process: its setting is changed from layer to layer.
            self.runtime.config = dataclasses.replace(self.runtime.config, replica_choice=choice)
            model = model_of_one_layer(*self.shape)
            self.runtime._shard(model, placement)
            mine = placement.rank_experts(0, self.runtime.rank)
            for parameter_name, whole in self.whole.named_parameters():
                setattr(model.experts, parameter_name, torch.nn.Parameter(whole.data[mine], requires_grad=False))
            self.layers[name], self.models[name] = model.experts, model.eval()
        return {"slots": {name: np.bincount(p.slot_rank).tolist() for name, (p, _) in made.items()}}

    def run(self, name: str, tokens: int, skew: float, number: int) -> dict[str, float]:
        """A rank's seconds for its part of a batch, from when all are ready until its tokens are home."""
        rank, size = self.runtime.rank, self.runtime.size
        mine = slice(tokens * rank // size, tokens * (rank + 1) // size)
        x, ids, weights = (whole[mine] for whole in self.batch(tokens, skew, number))
        layer = self.layers[name].moe_runtime_layer
        before, rows = layer.expert_seconds, layer.tokens_per_slot.sum()
        self.runtime.transport.barrier("bench")
        start = time.perf_counter()
        out = self.layers[name].exchange(x, ids, weights, WORKING)
        self.runtime.transport.barrier("bench")
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "expert_seconds": layer.expert_seconds - before,
            "rows": int(layer.tokens_per_slot.sum() - rows),
            "finite": bool(out.isfinite().all()),
        }

    def alone(self, tokens: int, skew: float, number: int, only: int = -1) -> dict[str, float]:
        """Seconds of the whole batch through all experts on this rank, nothing exchanged; `only` one rank, or all."""
        self.runtime.transport.barrier("bench")
        seconds = 0.0
        if only in (-1, self.runtime.rank):
            x, ids, weights = self.batch(tokens, skew, number)
            start = time.perf_counter()
            flat = ids.reshape(-1)
            order = flat.argsort(stable=True)
            rows_per_expert = np.bincount(flat.numpy(), minlength=self.num_experts)
            token = order // self.top_k
            began = time.perf_counter()
            outputs = grouped_experts(self.whole, x, token, rows_per_expert)
            combine_rows(outputs, token, tokens, weights.reshape(-1)[order])
            time.sleep((time.perf_counter() - began) * (self.slowdown - 1))
            seconds = time.perf_counter() - start
        self.runtime.transport.barrier("bench")
        return {"seconds": seconds}

    def moving(self, tokens: int, skew: float) -> dict[str, float]:
        """Seconds of a pass without a move, and of each pass of a live move of half of all experts."""
        model, layer = self.models["even"], self.layers["even"].moe_runtime_layer
        old = layer.placement
        owners = [[int(old.slot_rank[list(old.slot_expert[0]).index(e)])] for e in range(self.num_experts)]
        for expert in range(0, self.num_experts, 2):  # every second expert changes places with the other rank's
            owners[expert] = [1 - owners[expert][0]]
        still = [self.run("even", tokens, skew, number)["seconds"] for number in range(20)]
        self.runtime.rebalance(model, placements.from_owners([owners], 2))
        migration, passes = model.moe_runtime_rebalancer.migration, []
        while model.moe_runtime_rebalancer.migration is not None:
            passes.append(self.run("even", tokens, skew, len(passes))["seconds"])
        assert layer.placement is not old
        self.runtime.rebalance(model, old, wait=True)
        return {
            "still_s": float(np.median(still)),
            "moving_s": float(np.median(passes[:-1])),
            "last_s": passes[-1],  # checks the last checksums, and switches
            "passes": len(passes),
            "sent_mib": migration.bytes_sent / 2**20,
        }

    def recorder(self, tokens: int, skew: float) -> dict[str, float]:
        """Median seconds of a recorder's `add` for this rank's part of a batch, and the layer's without one."""
        name = SUBJECTS[-1]
        ids = self.batch(tokens, skew, 1)[1][: max(1, tokens // self.runtime.size)]
        holder = torch.nn.Module()
        holder.experts = self.layers[name]
        recorder = Recorder(holder, self.runtime.transport, "not written", limit_mib=8)
        recorder.detach()
        adds = []
        for _ in range(300):
            start = time.perf_counter()
            recorder.add(0, ids)
            adds.append(time.perf_counter() - start)
        layers = [self.run(name, tokens, skew, number)["seconds"] for number in range(5)]
        return {"add_s": float(np.median(adds)), "layer_s": float(np.median(layers))}


def serve(cluster: str, slots: int, shape: list[int]) -> int:
    """Runs on every rank: one measurement per line of stdin, [method, arguments]."""
    torch.set_num_threads(1)
    rank = BalanceRank(cluster, slots, shape)
    with rank.runtime, torch.inference_mode():
        print(json.dumps({"describe": rank.runtime.describe()}), flush=True)
        for line in sys.stdin:
            method, *arguments = json.loads(line)
            print(json.dumps(getattr(rank, method)(*arguments)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1], int(sys.argv[2]), [int(word) for word in sys.argv[3:]]))
