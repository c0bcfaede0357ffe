"""What `bench model` and `bench train` compare, one process (or rank) each, and what `bench model` measures on them.

A subject loads, then runs one measurement per line on stdin. The two transformers subjects are kept apart from
moe_runtime's own path on purpose: they are what a user would write without us.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SUBJECTS = ("moe-runtime", "transformers", "transformers-ep")


@dataclass(frozen=True)
class Loaded:
    """A subject's model on this rank. runtime: moe-runtime's, None for the others."""

    model: Any
    describe: Callable[[], str]
    rank: int = 0
    size: int = 1
    runtime: Any = None

    def share(self, whole_BT: torch.Tensor) -> torch.Tensor:
        """This rank's sequences of all ranks'."""
        return whole_BT[len(whole_BT) * self.rank // self.size : len(whole_BT) * (self.rank + 1) // self.size]


def load_moe_runtime(folder: Path) -> Loaded:
    import moe_runtime

    runtime = moe_runtime.init()
    model = runtime.load_model(folder, dtype=torch.bfloat16)
    return Loaded(model, runtime.describe, runtime.rank, runtime.size, runtime)


def load_transformers(folder: Path) -> Loaded:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return Loaded(model, lambda: f"transformers, {torch.get_num_threads()} threads")


def load_transformers_ep(folder: Path) -> Loaded:
    """transformers' own expert parallelism in data-parallel form: dense parameters by FSDP, experts by all-to-all."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    dist.init_process_group("gloo")
    size = dist.get_world_size()
    layout = DistributedConfig(fsdp_size=size, ep_size=size, ep_implementation="all_to_all")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, distributed_config=layout)
    return Loaded(model, lambda: f"transformers EP over gloo, {size} ranks", dist.get_rank(), size)


LOADERS = dict(zip(SUBJECTS, (load_moe_runtime, load_transformers, load_transformers_ep), strict=True))


def random_tokens(model: Any, sequences: int, length: int) -> torch.Tensor:
    """ids [sequences, length] int64, the same on every rank of every subject."""
    return torch.randint(0, model.config.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(1))


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
    loaded = LOADERS[name](Path(folder))
    model = loaded.model.eval()
    mine = loaded.share(random_tokens(model, int(sequences), int(length)))
    measure(model, mine[:, :16], 2)
    print(json.dumps({"ready": loaded.describe()}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure(model, mine, int(new_tokens))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
