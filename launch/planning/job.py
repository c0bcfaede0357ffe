"""What `--dry-run` says of a job's ranks: experts, bytes, expected seconds of a step and what bounds it.

Reads the model's config, no weights. Rates come from the cluster file, or are measured on this host's CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.cluster import Cluster
from ...core.errors import ConfigError
from ...experts.placement import Placement, load_plan
from ..generation import options as generation
from ..toml import apply_overrides, read_toml
from ..training.config import TrainConfig
from .measure import devices_of
from .plan import GIB, Planned, of_job, rank_rows
from .rates import Device
from .shape import EXPERT_BYTES, ModelShape, read_shape, shape_of
from .steps import PROMPT_TOKENS, Step, Work, buffers, predict

_LEFT_OUT = (
    "a floor (docs/planning.md has measured steps beside it): left out are attention's products with keys and values, "
    "activations of the dense part, all that is neither bytes nor multiply-adds; nothing overlaps"
)


@dataclass(frozen=True)
class Job:
    """A job as planned, with each rank's rates, and its steps [work][rank]. buffers: of each rank, in bytes by name."""

    planned: Planned
    devices: list[Device | None]
    works: tuple[Work, ...]
    steps: list[list[Step | None]]
    buffers: list[dict[str, float | None]]


def of_generate(arguments: Sequence[str], cluster: Cluster, threads: int | None = None) -> Job:
    """The generate job with these arguments. threads: of a rank; None is the launcher's default."""
    options = generation.parse(arguments)
    shape = read_shape(options.model, options.dtype)
    if options.expert_dtype != "auto":  # for every rank, whatever the cluster file says
        shape, cluster = dataclasses.replace(shape, stored=options.expert_dtype), _held_alike(cluster)
    elif EXPERT_BYTES[shape.stored] < 2 and not (options.keep_fp8 and shape.stored == "fp8"):
        shape = dataclasses.replace(shape, stored="bfloat16")  # dequantised while loading
    sequences, new = options.batch_size, options.max_new_tokens
    compressed = _is_compressed(apply_overrides({}, options.runtime).get("wire_format"))
    prompt = math.ceil(PROMPT_TOKENS / sequences)
    cached = sequences * (prompt + new / 2)  # in the middle of the answer
    works = (
        Work(f"decode step of {sequences} tokens a rank", sequences, sequences, cached, compressed=compressed),
        Work(f"prefill of {prompt * sequences:,} tokens a rank", prompt * sequences, sequences, compressed=compressed),
    )
    cache = shape.cache_bytes(prompt + new)
    placed = load_plan(options.placement) if options.placement else None
    return _job(shape, cluster, placed, works, threads, None if cache is None else cache * sequences)


def of_train(config: str, arguments: Sequence[str], cluster: Cluster, threads: int | None = None) -> Job:
    """The training job with this configuration."""
    from transformers import AutoConfig

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--set", action="append", default=[])
    table = apply_overrides(read_toml(Path(config)), parser.parse_known_args(list(arguments))[0].set)
    settings = TrainConfig.from_table(table, config)
    base, model = Path(config).resolve().parent, dict(settings.model)
    if "checkpoint" in model:
        shape = read_shape(base / model["checkpoint"], settings.dtype)
    else:
        try:
            shape = shape_of(AutoConfig.for_model(model.pop("model_type"), **model), config, settings.dtype)
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"{config}: model: {error}") from None
    tokens = settings.batch_size * settings.sequence_length
    of_rank = tokens / cluster.num_ranks
    compressed = _is_compressed(settings.runtime.get("wire_format"))
    name = f"optimizer step of {tokens:,} tokens in all"
    parts = settings.accumulate
    work = Work(name, of_rank, of_rank, trains=True, compressed=compressed, parts=parts)
    placed = load_plan(base / settings.placement) if settings.placement else None
    return _job(shape, _held_alike(cluster), placed, (work,), threads, 0.0)  # 8 bits cannot be trained


def _held_alike(cluster: Cluster) -> Cluster:
    """The cluster with no node that has a word of its own on what to hold experts in."""
    nodes = tuple(dataclasses.replace(node, expert_dtype=None) for node in cluster.nodes)
    return dataclasses.replace(cluster, nodes=nodes)


def _job(
    shape: ModelShape,
    cluster: Cluster,
    placed: Placement | None,
    works: tuple[Work, ...],
    threads: int | None,
    cache_bytes: float | None,
) -> Job:
    planned = of_job(shape, cluster, placed)
    devices = devices_of(cluster, "bfloat16" if EXPERT_BYTES[shape.stored] < 2 else shape.stored, threads)
    steps = [predict(shape, cluster, planned.plan, devices, work) for work in works]
    largest = max(works, key=lambda work: work.tokens)
    return Job(planned, devices, works, steps, buffers(shape, cluster, planned.plan, largest, cache_bytes))


def _is_compressed(wire_format: object) -> bool:
    return str(wire_format or "exact").split(",")[0].strip() in ("fp8", "int8")


def rank_lines(job: Job) -> list[list[str]]:
    """The lines of each rank: what it holds, what is left, and one of each step whose seconds are known."""
    shape, slowest = job.planned.shape, job.planned.times.max()
    lines = []
    for rank, (row, extra) in enumerate(zip(rank_rows(job.planned), job.buffers, strict=True)):
        mine = [
            f"{row['slots']} slots for {shape.num_experts} experts in each of {shape.num_layers} layers: "
            f"{_size(row['expert_bytes'])} ({row['expert_dtype']}) beside a dense part of {_size(shape.dense_bytes)}; "
            f"{row['share_of_rows']:.1%} of expert rows, {row['time'] / slowest:.0%} of the slowest's time by speed",
            f"buffers: {_buffers(extra)}; {_left(row['left_bytes'], extra)}",
        ]
        for work, steps in zip(job.works, job.steps, strict=True):
            if step := steps[rank]:
                parts = ", ".join(f"{part} {_time(seconds)}" for part, seconds in step.parts.items())
                without = f"; without exchange between {_pairs(step.unknown)}" if step.unknown else ""
                mine.append(f"{work.name}: {_time(step.seconds)} ({parts}); bound by {_bound(step)}{without}")
        lines.append(mine)
    return lines


def summary(job: Job) -> str:
    """What holds for all ranks: how far from optimal, rates, the slowest rank of each step, what is left out."""
    planned = job.planned
    over = planned.step / planned.bound - 1
    lines = [
        f"predicted, all experts alike and speeds as the cluster file has them: the slowest rank is {over:.1%} above "
        "what any placement in these slots can reach; `moe-launch plan` says more"
    ]
    nodes = planned.cluster.rank_nodes()
    sources = {device.source: None for device in job.devices if device}
    for source in sources:
        named = [
            node.name for node, device in zip(nodes, job.devices, strict=True) if device and device.source == source
        ]
        lines.append(f"rates of {', '.join(dict.fromkeys(named))}: {source}")
    unknown = dict.fromkeys(node.name for node, device in zip(nodes, job.devices, strict=True) if device is None)
    if unknown:
        lines.append(
            f"no seconds for {', '.join(unknown)}: not a CPU of this host; give tflops and memory_gb_s (what one "
            "device reaches) of the [[node]] in the cluster file"
        )
    pairs = {frozenset(pair) for step in job.steps[0] if step for pair in step.unknown}
    if pairs:
        lines.append(f"exchange not counted between {_pairs(pairs)}: give a [[link]] in the cluster file")
    if not unknown:
        lines += [_slowest(work, steps, len(nodes)) for work, steps in zip(job.works, job.steps, strict=True)]
    if sources:
        lines.append(_LEFT_OUT)
    return "\n".join(lines)


def _slowest(work: Work, steps: Sequence[Step | None], ranks: int) -> str:
    known = [(step.seconds, -rank, step) for rank, step in enumerate(steps) if step]
    seconds, rank, step = max(known, key=lambda found: found[:2])
    rate = work.tokens * ranks / seconds
    return (
        f"{work.name}: {_time(seconds)}, {rate:,.1f} tokens/s of all ranks; rank {-rank} is the slowest, "
        f"bound by {_bound(step)}"
    )


def _pairs(pairs: Iterable[Iterable[str]]) -> str:
    return ", ".join(sorted(" and ".join(sorted(pair)) for pair in pairs))


def _bound(step: Step) -> str:
    return f"{step.bound.part} ({step.bound.cause})"


def _buffers(extra: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {'unknown' if size is None else _size(size)}" for name, size in extra.items())


def _left(left: float | None, extra: dict[str, float | None]) -> str:
    if left is None:
        return "memory unknown"
    left -= sum(size for size in extra.values() if size is not None)
    return f"{_size(left)} left" if left >= 0 else f"DOES NOT FIT, {_size(-left)} short"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"
