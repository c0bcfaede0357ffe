"""What `bench generate` compares, one process (or rank) each: a line on stdin names what is to do all the work."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..generation.batch import RunningBatch, Settings, pad_left
from ..generation.requests import Request
from ..generation.serve import generate
from ..tokenizers import byte_tokenizer
from .generate import FIXED, PLAIN, REFILL

Run = Callable[[str, Sequence[Request]], dict[int, list]]  # (subject, all requests) -> results by number


class Tokens:
    """Results as `generate` hands them over."""

    def __init__(self) -> None:
        self.of: dict[int, list] = {}

    def take(self, results: list[list]) -> None:
        self.of |= {number: result for number, *result in results}

    def write(self) -> None:
        """They stay here."""


def fixed_batches(
    model: Any,
    requests: Sequence[Request],
    rank: int,
    size: int,
    batch_size: int,
    join: Callable[[], AbstractContextManager],
    exchange: Callable[[list], list[list]],
) -> dict[int, list]:
    """Rounds of transformers' own `generate`: each rank a padded batch, the next when the longest of all is done."""
    tokenizer, found = byte_tokenizer(), dict[int, list]()
    for start in range(0, len(requests), size * batch_size):
        part = requests[start : start + size * batch_size]
        mine = part[len(part) * rank // size : len(part) * (rank + 1) // size]
        results = []
        with join(), torch.inference_mode():
            if mine:
                ids, mask = pad_left([tokenizer.encode(request.prompt) for request in mine], tokenizer.pad_token_id)
                longest = max(request.max_new_tokens for request in mine)
                out = model.generate(ids, attention_mask=mask, max_new_tokens=longest, do_sample=False)
                for request, row in zip(mine, out[:, ids.shape[1] :].tolist(), strict=True):
                    tokens = row[: request.max_new_tokens]
                    results.append(
                        [request.number, tokenizer.decode(tokens, skip_special_tokens=True), len(tokens), []]
                    )
        for results_of_rank in exchange(results):
            found |= {number: result for number, *result in results_of_rank}
    return found


def main() -> int:
    folder, batch_size, *kind = sys.argv[1:]
    work = json.loads((Path(folder) / "work.json").read_text(encoding="utf-8"))
    requests = [Request(number, prompt, None, new) for number, (prompt, new) in enumerate(work, 1)]
    subjects = one_process if kind == [PLAIN] else moe_runtime_ranks
    run, passes = subjects(Path(folder) / "model", int(batch_size))
    run(FIXED, requests[:3])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        before, start = passes(), time.perf_counter()
        found = run(line.strip(), requests)
        seconds = time.perf_counter() - start
        digest = hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()
        print(json.dumps({"seconds": seconds, "passes": passes() - before, "digest": digest}), flush=True)
    return 0


def moe_runtime_ranks(folder: Path, batch_size: int) -> tuple[Run, Callable[[], int]]:
    """What runs a subject, and what counts the passes that this rank has taken part in."""
    import moe_runtime

    from ...comm.wire import all_gather_message
    from ...model import expert_layers

    runtime = moe_runtime.init()
    model = runtime.load_model(folder, dtype=torch.float32)

    def run(subject: str, requests: Sequence[Request]) -> dict[int, list]:
        if subject == REFILL:
            tokens = Tokens()
            batch = RunningBatch(model, byte_tokenizer(), Settings(batch_size=batch_size))
            generate(runtime, [batch], requests, tokens)
            return tokens.of

        def exchange(results: list) -> list[list]:
            return all_gather_message(runtime.transport, results, "results")

        return fixed_batches(
            model, requests, runtime.rank, runtime.size, batch_size, lambda: runtime.join(model), exchange
        )

    return run, lambda: expert_layers(model)[0].moe_runtime_layer.passes


def one_process(folder: Path, batch_size: int) -> tuple[Run, Callable[[], int]]:
    """As moe_runtime_ranks, with nothing of ours."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = list[None]()
    model.register_forward_pre_hook(lambda *_: seen.append(None))

    def run(_: str, requests: Sequence[Request]) -> dict[int, list]:
        return fixed_batches(model, requests, 0, 1, batch_size, nullcontext, lambda mine: [mine])

    return run, lambda: len(seen)


if __name__ == "__main__":
    sys.exit(main())
