"""The inference job that `moe-launch generate` starts on every rank: prompts in, continuations out, in input order.

Prompts go round by round: each round gives every rank at most `batch_size` of them, a rank with none only takes part
in expert layers, and rank 0 writes the round's results before the next begins.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

import moe_runtime

from ...checkpoint import CheckpointReader
from ...comm.wire import all_gather_message
from ...core.cluster import EXPERT_DTYPES
from ...core.config import RuntimeConfig
from ...core.errors import ConfigError
from ..tokenizers import load_tokenizer
from ..toml import apply_overrides

EXIT_SOME_INPUT_BAD = 2


@dataclass(frozen=True)
class Request:
    """One prompt, or why line `number` of the input is not one."""

    number: int
    prompt: str | None
    error: str | None = None


def read_requests(prompts: list[str], file: Path | None) -> list[Request]:
    """From --prompt, or a JSONL file of {"prompt": "..."} lines; a bad line becomes a Request with an error."""
    if file is None:
        return [Request(number, prompt) for number, prompt in enumerate(prompts, 1)]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
    return [_read_line(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _read_line(number: int, line: str) -> Request:
    try:
        record = json.loads(line)
    except ValueError as error:
        return Request(number, None, f"not JSON ({error})")
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"]:
        return Request(number, None, 'needs a non-empty string under "prompt"')
    return Request(number, record["prompt"])


def rounds(requests: list[Request], size: int, batch_size: int) -> Iterator[list[list[Request]]]:
    """Runs of size * batch_size requests, each cut into one consecutive part per rank (as equal as possible)."""
    for start in range(0, len(requests), size * batch_size):
        run = requests[start : start + size * batch_size]
        yield [run[len(run) * rank // size : len(run) * (rank + 1) // size] for rank in range(size)]


def generate(runtime: moe_runtime.Runtime, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> int:
    """All rounds; returns the number of requests that could not be read."""
    requests = read_requests(arguments.prompt, arguments.input)
    if not any(request.error is None for request in requests) and runtime.rank == 0:
        print("no prompt can be read", file=sys.stderr)
    good = [request for request in requests if request.error is None]
    sink = _Sink(requests, arguments) if runtime.rank == 0 else None
    started, tokens = time.perf_counter(), 0
    for number, parts in enumerate(rounds(good, runtime.size, arguments.batch_size)):
        torch.manual_seed(arguments.seed + 1000003 * number + runtime.rank)
        mine = continue_prompts(model, runtime, tokenizer, [r.prompt for r in parts[runtime.rank]], arguments)
        results = [result for part in all_gather_message(runtime.transport, mine, "results") for result in part]
        tokens += sum(count for _, count in results)
        if sink is not None:
            sink.write([request for part in parts for request in part], results, tokens, time.perf_counter() - started)
    if sink is not None:
        sink.close(len(good), tokens, time.perf_counter() - started)
    return len(requests) - len(good)


def continue_prompts(
    model: Any, runtime: moe_runtime.Runtime, tokenizer: Any, prompts: list[str], arguments: argparse.Namespace
) -> list[list]:
    """[text, number of new tokens] of each prompt; every rank calls, also with no prompt."""
    results: list[Any] = [None] * len(prompts)
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_k": 0, "top_p": 1.0}
    with runtime.join(model), torch.inference_mode():
        for batch in _batches(encoded, pad=not model._is_stateful):
            ids, mask = _pad_left([encoded[i] for i in batch], tokenizer.pad_token_id)
            out = model.generate(
                input_ids=ids.to(runtime.device),
                attention_mask=mask.to(runtime.device),
                max_new_tokens=arguments.max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
            for row, index in enumerate(batch):
                new = out[row, ids.shape[1] :].tolist()
                stop = model.generation_config.eos_token_id
                stops = set(stop if isinstance(stop, list) else [stop])
                end = next((at + 1 for at, token in enumerate(new) if token in stops), len(new))
                results[index] = [tokenizer.decode(new[:end], skip_special_tokens=True), end]
    return results


def _batches(encoded: list[list[int]], pad: bool) -> list[list[int]]:
    """Indices of prompts that run together. Models with rolling state (V4) cannot be padded: equal lengths only."""
    if pad:
        return [list(range(len(encoded)))] if encoded else []
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(encoded):
        by_length.setdefault(len(ids), []).append(index)
    return list(by_length.values())


def _pad_left(sequences: list[list[int]], padding: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids in sequences)
    ids = torch.full((len(sequences), longest), padding or 0, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = 1
    return ids, mask


class _Sink:
    """Rank 0's results: to the output file line by line, or to stdout; progress and the summary to stderr."""

    def __init__(self, requests: list[Request], arguments: argparse.Namespace) -> None:
        self._json = arguments.json
        self._total = len(requests)
        self._to_file = arguments.output is not None
        self._file: TextIO = _open_output(arguments.output) if self._to_file else sys.stdout
        self._bad = [request for request in requests if request.error is not None]
        self._records: list[dict] = []
        for request in self._bad:
            print(f"error: {arguments.input}, line {request.number}: {request.error}", file=sys.stderr)

    def write(self, requests: list[Request], results: list[list], tokens: int, seconds: float) -> None:
        for request, (text, count) in zip(requests, results, strict=True):
            self._emit_bad_before(request.number)
            self._emit({"line": request.number, "prompt": request.prompt, "text": text, "tokens": count})
        self._file.flush()
        if self._to_file:
            print(f"{requests[-1].number}/{self._total} prompts, {tokens / seconds:,.1f} tokens/s", file=sys.stderr)

    def close(self, prompts: int, tokens: int, seconds: float) -> None:
        self._emit_bad_before(sys.maxsize)
        summary = {"prompts": prompts, "bad_lines": self._total - prompts, "tokens": tokens, "seconds": seconds}
        summary["tokens_per_s"] = tokens / seconds if seconds else 0.0
        if self._json:
            print(json.dumps({**summary, "results": self._records}))
        print(
            f"{prompts} prompts, {tokens} new tokens in {seconds:.1f} s: {summary['tokens_per_s']:,.1f} tokens/s"
            + (f"; {summary['bad_lines']} bad lines" if summary["bad_lines"] else ""),
            file=sys.stderr,
        )
        if self._to_file:
            self._file.close()

    def _emit_bad_before(self, number: int) -> None:
        while self._bad and self._bad[0].number < number:
            request = self._bad.pop(0)
            self._emit({"line": request.number, "error": request.error})

    def _emit(self, record: dict) -> None:
        self._records.append(record)
        if self._to_file:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        elif not self._json and "text" in record:
            print(f"{record['prompt']}{record['text']}", file=self._file, flush=True)


def _open_output(path: Path) -> TextIO:
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written ({error.strerror}); give another file") from error


class LoadingProgress:
    """Tells on stderr how far loading is, at most every two seconds, so that a quick load says nothing."""

    def __init__(self, rank: int) -> None:
        self._silent_until = time.monotonic() + 2.0 if rank == 0 else float("inf")

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() >= self._silent_until:
            self._silent_until = time.monotonic() + 2.0
            print(f"loading: {done / total:.0%} of {total} tensors", file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moe-launch generate", description="continue prompts with a sharded model")
    parser.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--input", type=Path, help='JSONL file of {"prompt": "..."} lines')
    parser.add_argument("--output", type=Path, help="JSONL file for the results (default: text on stdout)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts per rank and round")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--keep-fp8", action="store_true", help="leave experts stored in FP8 as FP8")
    of_ranks = "what every rank holds its experts in; auto: as the cluster file says, else 8 bits where memory_gib asks"
    parser.add_argument("--expert-dtype", choices=("auto", *EXPERT_DTYPES), default="auto", help=of_ranks)
    parser.add_argument("--tokenizer", default="auto", help="auto: the checkpoint's; bytes: one token per byte")
    parser.add_argument("--placement", type=Path, help="plan file: which expert lives where")
    parser.add_argument("--record", type=Path, metavar="FILE.npz", help="write the load trace of this run")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cluster", help="cluster file")
    parser.add_argument("--timeout-s", type=float, default=300.0)
    parser.add_argument("--runtime", action="append", default=[], metavar="KEY=VALUE", help="a runtime setting")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if bool(arguments.prompt) == bool(arguments.input):
        raise ConfigError("give --prompt (once or more) or --input FILE.jsonl")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
    settings = {"cluster": arguments.cluster, "timeout_s": arguments.timeout_s}
    settings = apply_overrides(settings, arguments.runtime)
    CheckpointReader(arguments.model).close()  # a missing or broken file is told before anything is waited for
    with moe_runtime.init(RuntimeConfig.from_any(settings)) as runtime:
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
        if runtime.rank == 0:
            print(runtime.describe(), file=sys.stderr)
        with runtime.record(model, arguments.record) if arguments.record else nullcontext():
            bad = generate(runtime, model, tokenizer, arguments)
        # Rank 0 alone reports bad lines: a rank that ends first with an error would have the others stopped.
        return EXIT_SOME_INPUT_BAD if bad and runtime.rank == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
