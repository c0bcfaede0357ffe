"""A job script for test_engines.py: init, one dispatch and combine, and what came of it."""

import sys

import torch

import moe_runtime

with moe_runtime.init({"transport": sys.argv[1], "timeout_s": 60}) as runtime:
    dispatcher = runtime.dispatcher(hidden_size=8, num_experts=4, top_k=2, dtype=torch.float32)
    x_TH = torch.arange(24.0).view(3, 8) + runtime.rank
    rows, handle = dispatcher.dispatch(x_TH, torch.tensor([[0, 3]] * 3), torch.ones(3, 2))
    same = bool((dispatcher.combine(rows, handle) == 2 * x_TH).all())
    print(f"{runtime.world.launcher}:{runtime.rank}/{runtime.size}:{same}\n", end="", flush=True)
