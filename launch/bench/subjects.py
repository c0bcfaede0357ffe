"""What `bench model` compares, one process (or rank) each: it loads, then runs one measurement per line on stdin.

Kept apart from moe_runtime's own path on purpose: the two transformers subjects are what a user would write without us.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SUBJECTS = ("moe-runtime", "transformers", "transformers-ep")


def load_moe_runtime(folder: Path) -> tuple[Any, int, int, Callable[[], str]]:
    import moe_runtime

    runtime = moe_runtime.init()
    model = runtime.load_model(folder, dtype=torch.bfloat16)
    return model, runtime.rank, runtime.size, runtime.describe


def load_transformers(folder: Path) -> tuple[Any, int, int, Callable[[], str]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model, 0, 1, lambda: f"transformers, {torch.get_num_threads()} threads"


def load_transformers_ep(folder: Path) -> tuple[Any, int, int, Callable[[], str]]:
    """transformers' own expert parallelism in data-parallel form: dense parameters by FSDP, experts by all-to-all."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo")
    size = dist.get_world_size()
    layout = DistributedConfig(fsdp_size=size, ep_size=size, ep_implementation="all_to_all")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=layout)
    return model, dist.get_rank(), size, lambda: f"transformers EP over gloo, {size} ranks"


LOADERS = dict(zip(SUBJECTS, (load_moe_runtime, load_transformers, load_transformers_ep), strict=True))


def measure(model: Any, ids: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Seconds of one prefill of `ids` and of `new_tokens` greedy decode steps after it."""
    with torch.no_grad():
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        token = out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(new_tokens):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return {"prefill_s": prefill, "decode_s": time.perf_counter() - start}


def main() -> int:
    name, folder, threads, sequences, length, new_tokens = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model, rank, size, describe = LOADERS[name](Path(folder))
    model.eval()
    whole = torch.randint(
        0, model.config.vocab_size, (int(sequences), int(length)), generator=torch.Generator().manual_seed(1)
    )
    mine = whole[len(whole) * rank // size : len(whole) * (rank + 1) // size]
    measure(model, mine[:, :16], 2)
    print(json.dumps({"ready": describe()}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure(model, mine, int(new_tokens))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
