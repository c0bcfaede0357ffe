"""Rank 0's results: in the input's order, to a file line by line or to stdout; progress and the summary to stderr.

A result is written once all before it are, whole lines at a time, so that what an ended run leaves is the start of what
it would have written: `--resume` goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from ...core.errors import ConfigError
from .requests import Request


class Sink:
    """`start` when the model is there, `take` results as they come, `write` those whose turn it is, `close` with the
    summary. An existing file is not touched before `start`: the model may not load."""

    def __init__(self, requests: list[Request], kept: list[dict], arguments: argparse.Namespace) -> None:
        """kept: the records that the file has already. Raises ConfigError when it cannot be written."""
        self._json, self._logprobs = arguments.json, arguments.logprobs
        self._file: TextIO | None = None
        if arguments.output is not None:
            self._file = _open(arguments.output)
        self._requests, self._records = requests, list(kept)
        self._ready: dict[int, list] = {}  # results whose turn it is not, by line
        self._tokens, self._kept, self._started = 0, len(kept), 0.0
        self._silent_until = 0.0
        for request in requests:
            if request.error is not None:
                print(f"error: {arguments.input}, line {request.number}: {request.error}", file=sys.stderr)
        if kept:
            print(f"{arguments.output}: {len(kept)} of {len(requests)} results are there already", file=sys.stderr)

    def start(self) -> None:
        self._started = time.perf_counter()
        if self._file is not None and not self._kept:
            self._file.truncate(0)

    def take(self, results: list[list]) -> None:
        """[line, text, number of new tokens, their log-probabilities] each, in any order."""
        for number, *result in results:
            self._ready[number] = result
            self._tokens += result[1]

    def write(self) -> None:
        """Write the results that follow those written."""
        before = len(self._records)
        while len(self._records) < len(self._requests):
            request = self._requests[len(self._records)]
            if request.error is not None:
                self._emit({"line": request.number, "error": request.error})
            elif request.number in self._ready:
                text, tokens, logprobs = self._ready.pop(request.number)
                record = {"line": request.number, "prompt": request.prompt, "text": text, "tokens": tokens}
                self._emit({**record, "logprobs": logprobs} if self._logprobs else record)
            else:
                break
        if self._file is not None and len(self._records) > before:
            self._file.flush()
            if time.perf_counter() < self._silent_until:
                return
            self._silent_until = time.perf_counter() + 2.0
            rate = self._tokens / (time.perf_counter() - self._started)
            print(f"{len(self._records)}/{len(self._requests)} prompts, {rate:,.1f} tokens/s", file=sys.stderr)

    def close(self) -> None:
        self.write()
        seconds = time.perf_counter() - self._started
        bad = sum(request.error is not None for request in self._requests)
        prompts = len(self._requests) - bad
        rate = self._tokens / seconds
        summary = {"prompts": prompts, "bad_lines": bad, "tokens": self._tokens, "seconds": seconds}
        if self._json:
            print(json.dumps({**summary, "tokens_per_s": rate, "results": self._records}))
        print(
            f"{prompts} prompts, {self._tokens} new tokens in {seconds:.1f} s: {rate:,.1f} tokens/s"
            + (f"; {self._kept} results were there already" if self._kept else "")
            + (f"; {bad} bad lines" if bad else ""),
            file=sys.stderr,
        )
        if self._file is not None:
            self._file.close()

    def _emit(self, record: dict) -> None:
        self._records.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        elif not self._json and "text" in record:
            print(f"{record['prompt']}{record['text']}", flush=True)


def take_up(path: Path, requests: list[Request], logprobs: bool) -> list[dict]:
    """The records of an output file that an ended run left; a last line without its end is cut off the file.

    [] where there is no file. Raises ConfigError when it is not the start of these requests' results.
    """
    if not path.exists():
        return []
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be read ({error.strerror})") from error
    whole = data[: data.rfind(b"\n") + 1]
    records = [_read_record(path, number, line) for number, line in enumerate(whole.splitlines(), 1)]
    if len(records) > len(requests):
        raise ConfigError(f"--resume: {path} has {len(records)} results, the input only {len(requests)} prompts")
    for at, (record, request) in enumerate(zip(records, requests, strict=False), 1):
        same = (record.get("line"), record.get("prompt"), "error" in record)
        if same != (request.number, request.prompt, request.error is not None):
            raise ConfigError(f"--resume: line {at} of {path} is not the result of input line {request.number}")
        if "error" not in record and ("logprobs" in record) != logprobs:
            raise ConfigError(f"--resume: {path} was written {'without' if logprobs else 'with'} --logprobs")
    if len(whole) < len(data):
        try:
            os.truncate(path, len(whole))
        except OSError as error:
            raise ConfigError(f"--output {path}: cannot be written ({error.strerror})") from error
    return records


def _read_record(path: Path, number: int, line: bytes) -> dict:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--resume: line {number} of {path} is not JSON ({error}); is this an answer file?") from None
    if not isinstance(record, dict):
        raise ConfigError(f"--resume: line {number} of {path} is not a result")
    return record


def _open(path: Path) -> TextIO:
    try:
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written ({error.strerror}); give another file") from error
