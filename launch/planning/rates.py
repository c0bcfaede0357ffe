"""How long things take: from figures that are given, or from what `moe-launch bench experts --layer` measured."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import ConfigError
from .shape import ModelShape

# Of a row's values: out as FP8 with a float32 scale for 128 of them, home in bfloat16.
OUT_BYTES, HOME_BYTES = 1.0 + 4.0 / 128, 2.0


@dataclass(frozen=True)
class Rates:
    """Of a device of speed 1. seconds_per_row: one token in one expert; seconds_per_expert: to read an active expert.

    bytes_per_row: a token's way to a rank and its result's way home. `source` says where the numbers come from; in
    `unit`, "s", or "rows" where nothing is known but speeds.
    """

    seconds_per_row: float
    seconds_per_expert: float
    bytes_per_row: float
    source: str
    unit: str = "s"


@dataclass(frozen=True)
class Device:
    """What one rank's device reaches: multiply-adds times 2, bytes read and bytes copied, per second."""

    flops: float
    read_bytes: float
    copied_bytes: float
    source: str


def given_device(tflops: float, memory_gb_s: float) -> Device:
    """As a node of the cluster file says it. A copy reads and writes: half the rate."""
    source = f"given in the cluster file: {tflops:g} TFLOP/s, {memory_gb_s:g} GB/s"
    return Device(tflops * 1e12, memory_gb_s * 1e9, memory_gb_s * 1e9 / 2, source)


def expert_seconds(shape: ModelShape, flops: float, read_bytes: float) -> tuple[float, float]:
    """(seconds of one token in one expert, seconds to read an active expert's weights)."""
    return 2 * shape.products_per_row / flops, shape.expert_bytes / read_bytes


def add_options(group: Any) -> None:
    """The options that say how fast a device of speed 1 is."""
    what = "what `moe-launch bench experts --layer --json` wrote on a device of speed 1"
    group.add_argument("--calibration", metavar="FILE", help=what)
    group.add_argument("--tflops", type=float, metavar="X", help="10^12 multiply-adds times 2 per second, reached")
    group.add_argument("--memory-gb-s", type=float, metavar="X", help="10^9 bytes of weights read per second")


def make_rates(options: argparse.Namespace, shape: ModelShape) -> Rates:
    """From the options."""
    bytes_per_row = shape.hidden * (OUT_BYTES + HOME_BYTES)
    given = [name for name in ("tflops", "memory_gb_s") if getattr(options, name) is not None]
    for name in given:
        if not getattr(options, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0")
    if options.calibration and given:
        raise ConfigError("--calibration and --tflops/--memory-gb-s say the same thing; give one of them")
    if options.calibration:
        return _measured(Path(options.calibration), shape, bytes_per_row)
    if options.tflops is None:
        if given:
            raise ConfigError("--memory-gb-s without --tflops; give both, or --tflops alone")
        return speeds_only(shape)
    read_bytes = options.memory_gb_s * 1e9 if options.memory_gb_s else math.inf
    per_row, per_expert = expert_seconds(shape, options.tflops * 1e12, read_bytes)
    source = f"given: {options.tflops:g} TFLOP/s"
    source += f", {options.memory_gb_s:g} GB/s of weights" if options.memory_gb_s else "; reading weights costs nothing"
    return Rates(per_row, per_expert, bytes_per_row, source)


def speeds_only(shape: ModelShape) -> Rates:
    """Where nothing but relative speeds is known."""
    source = "nothing measured: times are in rows of a device of speed 1"
    return Rates(1.0, 0.0, shape.hidden * (OUT_BYTES + HOME_BYTES), source, "rows")


def _measured(path: Path, shape: ModelShape, bytes_per_row: float) -> Rates:
    """Least squares of seconds = rows * a + experts * b over the measured numbers of tokens, scaled to this model."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        its = found["shape"]
        points = [
            (int(tokens) * its["top_k"] / found["ranks"], max(row["hit"]), row["seconds"])
            for tokens, row in found["tokens"].items()
        ]
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the calibration ({error.strerror}); check the path") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not what `moe-launch bench experts --layer --json` writes ({error!r}); write it again"
        ) from None
    if len(points) < 2:
        raise ConfigError(f"{path}: measured with {len(points)} number of tokens; two or more are needed")
    rows, experts, seconds = np.array(points, dtype=np.float64).T
    # Relative errors count: one token must not drown in a thousand.
    table = np.stack([rows, experts], axis=1) / seconds[:, None]
    per_row, per_expert = np.linalg.lstsq(table, np.ones(len(points)), rcond=None)[0].tolist()
    if per_row <= 0 or per_expert < 0:  # more rows never cost less: what one of them cannot explain, the other does
        per_row, per_expert = float(np.median(seconds / rows)), 0.0
    weights = 3 * its["hidden"] * its["intermediate"]
    per_row *= shape.products_per_row / weights
    per_expert *= shape.expert_bytes / (weights * (1 + 4 / 128**2))  # that bench holds FP8
    source = f"measured: {path} ({found.get('machine', 'machine unknown')})"
    return Rates(per_row, per_expert, bytes_per_row, source)
