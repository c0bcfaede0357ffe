"""The inference job that `moe-launch generate` starts on every rank: prompts in, continuations out, in input order.

Its parts are in launch/generation: options, input, the running batch, how prompts reach ranks, output.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

import moe_runtime

from ...checkpoint import CheckpointReader
from ...comm.wire import all_gather_message
from ...core.config import RuntimeConfig
from ...core.errors import ConfigError
from ..generation import gain, options
from ..generation import survive as generation
from ..generation.batch import RunningBatch, Settings
from ..generation.output import Sink, take_up
from ..generation.requests import Request, read_requests
from ..generation.sampling import Sampling
from ..generation.serve import generate, halves_pay
from ..tokenizers import load_tokenizer
from ..toml import apply_overrides

EXIT_SOME_INPUT_BAD = 2
_LOOKED_AT = 64  # prompts whose lengths tell what the others are like


def main(argv: Sequence[str] | None = None) -> int:
    arguments = options.parse(argv)
    options.check(arguments)
    settings = {"cluster": arguments.cluster, "timeout_s": arguments.timeout_s}
    settings = apply_overrides(settings, [*arguments.runtime, *(["rebalance=auto"] * arguments.rebalance)])
    CheckpointReader(arguments.model).close()  # a missing or broken file is told before anything is waited for
    requests = read_requests(arguments.prompt, arguments.input)
    with moe_runtime.init(RuntimeConfig.from_any(settings)) as runtime:
        survives = runtime.on_loss != "fail"
        if survives and arguments.record:
            raise ConfigError("--record and --on-loss do not go together: a trace would have a gap; leave one out")
        sink, done = (None, 0) if survives else open_output(runtime, requests, arguments)
        tokenizer = load_tokenizer(arguments.tokenizer, arguments.model)
        dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
        model = runtime.load_model(
            arguments.model,
            dtype=dtype,
            placement=arguments.placement,
            keep_fp8=arguments.keep_fp8,
            expert_dtype=arguments.expert_dtype,
            progress=LoadingProgress(runtime.rank),
        )
        good = [request for request in requests[done:] if request.error is None]
        if survives:
            return survive(runtime, model, tokenizer, requests, arguments)
        batches, halved = make_batches(runtime, model, tokenizer, good, arguments)
        if runtime.rank == 0:
            print(runtime.describe(), *batches[0].describe(), halved, sep="\n", file=sys.stderr)
            if not any(request.error is None for request in requests):
                print("no prompt can be read", file=sys.stderr)
        if sink is not None:
            sink.start()
        with runtime.record(model, arguments.record) if arguments.record else nullcontext():
            generate(runtime, batches, good, sink)
        if sink is not None:
            sink.close()
        if arguments.placement or runtime.config.rebalance == "auto":
            load = runtime.load(model, by_rank=True)  # every rank calls
            if runtime.rank == 0:
                print(gain.describe(load, runtime.rank_speeds), file=sys.stderr)
        # Rank 0 alone reports bad lines: a rank that ends first with an error would have the others stopped.
        bad = any(request.error is not None for request in requests)
        return EXIT_SOME_INPUT_BAD if bad and runtime.rank == 0 else 0


def survive(
    runtime: moe_runtime.Runtime, model: Any, tokenizer: Any, requests: list[Request], arguments: argparse.Namespace
) -> int:
    """The job where ranks may be lost, come and leave (generation/survive.py)."""
    good = [request for request in requests if request.error is None]
    batch = RunningBatch(model, tokenizer, batch_settings(arguments, arguments.batch_size))
    spooled = generation.spooled(arguments, runtime.log_dir)

    def open_sink(goes_on: bool) -> tuple[Sink, set[int]]:
        kept = take_up(spooled.output, requests, arguments.logprobs) if goes_on or arguments.resume else []
        sink = Sink(requests, kept, spooled)
        sink.start()
        return sink, {record["line"] for record in kept}

    if runtime.rank == 0 and not runtime.joins:
        halved = "halves: off, a pass may be broken off"
        print(runtime.describe(), *batch.describe(), halved, sep="\n", file=sys.stderr)
    job = generation.SurvivingGeneration(runtime, batch, good, open_sink)
    if not job.run():
        print(f"rank {runtime.number} has been drained", file=sys.stderr)
        return 0
    writes = job.sink is not None
    if writes:
        job.sink.close()
        if arguments.output is None and not arguments.json:
            generation.show(spooled.output)
    runtime.leave()
    return EXIT_SOME_INPUT_BAD if len(good) < len(requests) and writes else 0


def open_output(
    runtime: moe_runtime.Runtime, requests: list[Request], arguments: argparse.Namespace
) -> tuple[Sink | None, int]:
    """Rank 0's sink, and how many of the requests' results are there already; every rank calls, before loading.

    Raises ConfigError, on all ranks, for an output that cannot be used, and where ranks read other input.
    """
    sink, kept, problem = None, [], ""
    if runtime.rank == 0:
        try:
            kept = take_up(arguments.output, requests, arguments.logprobs) if arguments.resume else []
            sink = Sink(requests, kept, arguments)
        except ConfigError as error:
            problem = str(error)
    digest = hashlib.sha256(repr(requests).encode()).hexdigest()
    said = all_gather_message(runtime.transport, [problem, len(kept), digest], "output")
    other = next((rank for rank, (_, _, theirs) in enumerate(said) if theirs != said[0][2]), None)
    if other is not None:
        problem = f"{arguments.input}: rank {other} reads other prompts there than rank 0; give all hosts the same file"
    if problem or said[0][0]:
        raise ConfigError(problem or said[0][0])
    return sink, said[0][1]


def make_batches(
    runtime: moe_runtime.Runtime, model: Any, tokenizer: Any, requests: list[Request], arguments: argparse.Namespace
) -> tuple[list[RunningBatch], str]:
    """This rank's running batch, or two halves of it where that is asked for or pays; and that in words."""
    if arguments.halves == "auto" and runtime.config.rebalance == "auto":
        on, told = False, "halves: off, experts may move while the model runs"
    elif arguments.halves == "auto" and arguments.batch_size > 1 and requests:
        some = [len(tokenizer.encode(request.prompt)) for request in requests[:_LOOKED_AT]]
        prompt = max(1, sum(some) // len(some))
        sizes = (arguments.batch_size, prompt, arguments.prefill_chunk, arguments.max_new_tokens)
        on, told = halves_pay(runtime, model, *sizes)
    else:
        on = arguments.halves == "on" and arguments.batch_size > 1
        told = f"halves: {'on' if on else 'off'}"
    sizes = (
        [arguments.batch_size - arguments.batch_size // 2, arguments.batch_size // 2] if on else [arguments.batch_size]
    )
    return [RunningBatch(model, tokenizer, batch_settings(arguments, size)) for size in sizes], told


def batch_settings(arguments: argparse.Namespace, batch_size: int) -> Settings:
    return Settings(
        max_new_tokens=arguments.max_new_tokens,
        batch_size=batch_size,
        prefill_chunk=arguments.prefill_chunk,
        sampling=Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed),
        stop=tuple(arguments.stop),
        logprobs=arguments.logprobs,
    )


class LoadingProgress:
    """Tells on stderr how far loading is, at most every two seconds, so that a quick load says nothing."""

    def __init__(self, rank: int) -> None:
        self._silent_until = time.monotonic() + 2.0 if rank == 0 else float("inf")

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() >= self._silent_until:
            self._silent_until = time.monotonic() + 2.0
            print(f"loading: {done / total:.0%} of {total} tensors", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
