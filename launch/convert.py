"""`moe-launch convert`: a checkpoint in bfloat16, FP8 blocks or INT8 blocks, and how far its weights are then off."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

_TARGETS = ("bfloat16", "fp8", "int8")  # convert.TARGETS, which would import torch


def add_options(parser: Any) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder of a Hugging Face checkpoint")
    parser.add_argument(
        "target", metavar="DEST", help="the new folder; an older checkpoint there is replaced at the end"
    )
    parser.add_argument("--to", required=True, choices=_TARGETS, help="the format of the new one")
    parser.add_argument(
        "--experts-only", action="store_true", help="8 bits for routed experts alone; all else in bfloat16"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(options: argparse.Namespace) -> int:
    from ..convert import convert

    began = time.perf_counter()
    report = convert(Path(options.source), Path(options.target), options.to, options.experts_only, _Progress())
    seconds, errors = time.perf_counter() - began, report.errors
    if options.json:
        found = {
            "source": options.source,
            "target": options.target,
            "to": options.to,
            "tensors": report.tensors,
            "changed": report.changed,
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "blocks": errors.blocks,
            "largest_error": errors.largest,
            "largest_error_in": errors.largest_in,
            "mean_error": errors.mean,
            "rms_error": errors.root_mean_square,
            "left_out": report.left_out,
            "seconds": seconds,
        }
        print(json.dumps(found))
        return 0
    before, after = _size(report.bytes_before), _size(report.bytes_after)
    print(
        f"{options.target}: {report.changed} of {report.tensors} tensors now in {options.to}; {before} before, {after} "
        f"after; {seconds:.1f} s"
    )
    print(
        f"measured against the source's values: the largest difference of a 128x128 block, over its largest value, is "
        f"{errors.mean:.2%} in the mean of {errors.blocks:,} blocks and {errors.largest:.2%} at most "
        f"({errors.largest_in}); all differences together {errors.root_mean_square:.2%} (root mean squares)"
    )
    if report.left_out:
        print(f"not copied: {', '.join(report.left_out)}")
    return 0


class _Progress:
    """Tells on stderr how far it is, at most every two seconds, so that a quick one says nothing."""

    def __init__(self) -> None:
        self._silent_until = time.monotonic() + 2.0

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() >= self._silent_until:
            self._silent_until = time.monotonic() + 2.0
            print(f"converting: {done / total:.0%} of {total} tensors", file=sys.stderr, flush=True)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
