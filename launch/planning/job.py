"""What `--dry-run` says of a job's ranks: experts, bytes, expected work. Reads the model's config, no weights."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ...core.cluster import Cluster
from ...core.errors import ConfigError
from ...experts.placement import load_plan
from ..generation import options as generation
from ..toml import apply_overrides, read_toml
from .plan import GIB, Planned, of_job, rank_rows
from .shape import EXPERT_BYTES, read_shape, shape_of


def of_generate(arguments: Sequence[str], cluster: Cluster) -> Planned:
    """The generate job with these arguments."""
    options = generation.parse(arguments)
    shape = read_shape(options.model, options.dtype)
    if shape.stored == "fp8" and not options.keep_fp8:  # dequantised while loading
        shape = dataclasses.replace(shape, stored="bfloat16")
    return of_job(shape, cluster, load_plan(options.placement) if options.placement else None)


def of_train(config: str, arguments: Sequence[str], cluster: Cluster) -> Planned:
    """The training job with this configuration. Gradients and optimizer state are not counted."""
    from transformers import AutoConfig

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--set", action="append", default=[])
    table = apply_overrides(read_toml(Path(config)), parser.parse_known_args(list(arguments))[0].set)
    base, model, dtype = Path(config).resolve().parent, dict(table.get("model", {})), table.get("dtype", "float32")
    if dtype not in EXPERT_BYTES:
        raise ConfigError(f"{config}: dtype must be float32 or bfloat16, got {dtype!r}")
    if "checkpoint" in model:
        shape = read_shape(base / model["checkpoint"], dtype)
    else:
        try:
            shape = shape_of(AutoConfig.for_model(model.pop("model_type"), **model), config, dtype)
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"{config}: model: {error}") from None
    return of_job(shape, cluster, load_plan(base / table["placement"]) if "placement" in table else None)


def rank_lines(planned: Planned) -> list[str]:
    """One line per rank."""
    shape, slowest = planned.shape, planned.times.max()
    lines = []
    for row in rank_rows(planned):
        left = row["left_bytes"]
        room = "memory unknown" if left is None else f"{_size(left)} left for rows, KV cache and the rest"
        work = f"{row['share_of_rows']:.1%} of expert rows, {row['time'] / slowest:.0%} of the slowest's time"
        lines.append(
            f"{row['slots']} slots for {shape.num_experts} experts in each of {shape.num_layers} layers: "
            f"{_size(row['expert_bytes'])} ({shape.stored}) beside a dense part of {_size(shape.dense_bytes)}; "
            f"{room}; {work}"
        )
    return lines


def summary(planned: Planned) -> str:
    over = planned.step / planned.bound - 1
    return (
        f"predicted, all experts alike and speeds as the cluster file has them: the slowest rank is {over:.1%} above "
        "what any placement in these slots can reach; `moe-launch plan` says more"
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"
