"""Loads and routings on disk: our own .npz, and readers of what SGLang and Megatron write.

A load trace is tokens per expert over time, `load [steps, L, E]`; a routing trace is what every token selected,
`topk_ids [T, L, K]`. L counts MoE layers only; `layers` says which layers of the model they are, where that is known.
Never pickle. Every reader raises ConfigError in one line: which file, what is wrong, what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import ConfigError
from ..core.files import BROKEN_ARRAY, write_atomically

SCHEMA = 1


@dataclass(frozen=True)
class LoadTrace:
    """load [steps, L, E]: tokens per expert in each recorded step; `layers` [L]: their numbers in the model."""

    load: np.ndarray
    layers: tuple[int, ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        load = self.load
        if load.ndim != 3 or 0 in load.shape or load.dtype.kind not in "iuf":
            raise ConfigError(f"load trace: load is {load.dtype} {load.shape}; it must be numbers [steps, L, E]")
        if not np.isfinite(load).all() or (load < 0).any():
            raise ConfigError("load trace: load has counts that are negative or no numbers")
        _check_layers(self.layers, load.shape[1], "load trace")

    @property
    def total(self) -> np.ndarray:
        """[L, E]: all steps together, what plan() takes."""
        return self.load.sum(axis=0, dtype=np.float64)


@dataclass(frozen=True)
class RoutingTrace:
    """topk_ids [T, L, K]: the experts each token selected in each MoE layer, -1 for none; E experts."""

    topk_ids: np.ndarray
    num_experts: int
    layers: tuple[int, ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = self.topk_ids
        if ids.ndim != 3 or 0 in ids.shape[1:] or ids.dtype.kind not in "iu":
            raise ConfigError(f"routing trace: topk_ids is {ids.dtype} {ids.shape}; it must be integers [T, L, K]")
        if ids.size and (ids.min() < -1 or ids.max() >= self.num_experts):
            raise ConfigError(f"routing trace: topk_ids names an expert outside -1..{self.num_experts - 1}")
        _check_layers(self.layers, ids.shape[1], "routing trace")

    @property
    def load(self) -> np.ndarray:
        """[L, E]: how often each expert was selected."""
        num_layers = self.topk_ids.shape[1]
        at = self.topk_ids.astype(np.int64) + self.num_experts * np.arange(num_layers)[None, :, None]
        return np.bincount(at[self.topk_ids >= 0], minlength=num_layers * self.num_experts).reshape(num_layers, -1)


def save(trace: LoadTrace | RoutingTrace, path: str | Path) -> None:
    """Writes a trace to `path` (.npz); the file appears whole or not at all."""
    is_load = isinstance(trace, LoadTrace)
    arrays = {"load": trace.load} if is_load else {"topk_ids": trace.topk_ids, "num_experts": trace.num_experts}
    head = {
        "schema": SCHEMA,
        "kind": "load" if is_load else "routing",
        "layers": None if trace.layers is None else list(trace.layers),
        "metadata": dict(trace.metadata),
    }
    try:
        text = json.dumps(head)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: the trace's metadata is not plain JSON ({error})") from None
    write_atomically(path, lambda file: np.savez_compressed(file, head=np.array(text), **arrays))


def read_load(path: str | Path) -> LoadTrace:
    """A load trace from .npz, or from the JSON that SGLang dumps: {"logical_count": [L][E]} or [steps][L][E].

    Layers in which nothing is counted (dense ones) are left out of JSON loads; `layers` says which stay. An .npz
    without our head may give `load` or `counts`, [steps, L, E].
    """
    if Path(path).suffix == ".json":
        return _read_sglang(path)
    arrays, head = _read_npz(path, "load")
    name = "load" if "load" in arrays else "counts"
    if name not in arrays:
        raise ConfigError(
            f"{path}: no load trace: it has {', '.join(arrays) or 'nothing'}; expected load [steps, L, E]"
        )
    load = arrays[name]
    return _named(path, LoadTrace, load[None] if load.ndim == 2 else load, *_head_fields(head))


def read_routing(path: str | Path) -> RoutingTrace:
    """A routing trace from .npz."""
    arrays, head = _read_npz(path, "routing")
    if "topk_ids" not in arrays:
        raise ConfigError(
            f"{path}: no routing trace: it has {', '.join(arrays) or 'nothing'}; expected topk_ids [T, L, K]"
        )
    ids = arrays["topk_ids"]
    experts = int(arrays["num_experts"]) if "num_experts" in arrays else int(ids.max(initial=-1)) + 1
    return _named(path, RoutingTrace, ids, experts, *_head_fields(head))


def read_megatron_routing(paths: Iterable[str | Path], num_experts: int) -> RoutingTrace:
    """A routing trace from Megatron's JSON lines, one file per rank.

    A line is {"step", "stage", "block", "layer", "rank", "num_tokens", "topk", "top_indices"}, top_indices being
    [num_tokens][topk]. Tokens are ordered by step, then rank. Every step and rank must have every layer.
    """
    rows: dict[tuple[int, int], dict[int, np.ndarray]] = {}
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot read the routing trace ({error}); check the path") from None
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                key = int(row["step"]), int(row["rank"])
                layer, shape = int(row["layer"]), (int(row["num_tokens"]), int(row["topk"]))
                ids = np.array(row["top_indices"], dtype=np.int32).reshape(shape)
            except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
                raise ConfigError(f"{path}: line {number} is no Megatron routing record ({error!r})") from None
            if layer in rows.setdefault(key, {}):
                raise ConfigError(f"{path}: line {number} gives step {key[0]}, rank {key[1]}, layer {layer} again")
            rows[key][layer] = ids
    if not rows:
        raise ConfigError("Megatron routing trace: the files hold no records")
    layers = sorted({layer for by_layer in rows.values() for layer in by_layer})
    for (step, rank), by_layer in rows.items():
        missing = [layer for layer in layers if layer not in by_layer]
        if missing or len({ids.shape for ids in by_layer.values()}) > 1:
            what = f"lacks layer {missing[0]}" if missing else "has layers with other numbers of tokens"
            raise ConfigError(f"Megatron routing trace: step {step}, rank {rank} {what}; give the whole step's files")
    if len({ids.shape[1] for by_layer in rows.values() for ids in by_layer.values()}) > 1:
        raise ConfigError("Megatron routing trace: the records differ in topk; give files of one run")
    ids = np.concatenate([np.stack([rows[key][layer] for layer in layers], axis=1) for key in sorted(rows)])
    return RoutingTrace(ids, num_experts, tuple(layers), {"source": "Megatron routing JSONL"})


def synthetic_load(num_layers: int = 58, num_experts: int = 256, tokens: float = 1e6, seed: int = 0) -> np.ndarray:
    """A load [L, E] for trying things without a trace: Zipf's law with noise, shuffled, different in every layer.

    Expert of rank k gets tokens in proportion to (k + 12) ** -s, with s between 0.8 and 1.3 per layer, times
    log-normal noise of 0.25. Made up, in the likeness of published loads; not measured anywhere.
    """
    random = np.random.default_rng(seed)
    exponent = random.uniform(0.8, 1.3, (num_layers, 1))
    load = (np.arange(num_experts) + 12.0) ** -exponent * random.lognormal(0.0, 0.25, (num_layers, num_experts))
    load = random.permuted(load, axis=1)
    return np.rint(load / load.sum(axis=1, keepdims=True) * tokens)


def synthetic_routing(
    load: np.ndarray, tokens: int, top_k: int = 8, groups: int = 8, top_groups: int = 4, seed: int = 0
) -> np.ndarray:
    """topk_ids [T, L, K] whose counts follow a load [L, E], by DeepSeek-V3's group-limited gate.

    Scores are biases plus Gumbel noise; the groups with the largest sum of two scores stay, then the top K. Biases are
    fitted by a few rounds. Experts of different groups are otherwise independent, which real routing is not.
    """
    random = np.random.default_rng(seed)
    num_layers, num_experts = load.shape
    if num_experts % groups or top_k > top_groups * (num_experts // groups):
        raise ConfigError(
            f"synthetic routing: {num_experts} experts do not divide into {groups} groups for top-{top_k}"
        )
    ids = np.empty((tokens, num_layers, top_k), np.int32)
    for layer in range(num_layers):
        wanted = load[layer] / max(load[layer].sum(), 1e-30) * top_k
        bias, noise = np.log(wanted + 1e-9), random.gumbel(size=(tokens, num_experts))
        for _ in range(12):
            score = bias + noise
            of_group = np.sort(score.reshape(tokens, groups, -1), axis=2)[:, :, -2:].sum(axis=2)
            stays = np.zeros((tokens, groups), bool)
            np.put_along_axis(stays, np.argsort(-of_group, axis=1, kind="stable")[:, :top_groups], True, axis=1)
            score = np.where(np.repeat(stays, num_experts // groups, axis=1), score, -np.inf)
            ids[:, layer] = np.argpartition(-score, top_k - 1, axis=1)[:, :top_k]
            got = np.bincount(ids[:, layer].ravel(), minlength=num_experts) / tokens
            bias = bias + 0.5 * np.log((wanted + 1e-3) / (got + 1e-3))
    return ids


def _read_sglang(path: str | Path) -> LoadTrace:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the load trace ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict) or "logical_count" not in found:
        raise ConfigError(f'{path}: no "logical_count"; expected the JSON that SGLang\'s expert recorder dumps')
    try:
        load = np.array(found["logical_count"], dtype=np.float64, ndmin=3)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{path}: logical_count is no array of numbers [L][E]") from None
    if load.ndim != 3:
        raise ConfigError(f"{path}: logical_count has {load.ndim} dimensions; expected [L][E] or [steps][L][E]")
    layers = np.flatnonzero(np.nansum(np.abs(load), axis=(0, 2)) > 0)
    if not len(layers):
        raise ConfigError(f"{path}: logical_count is zero everywhere; record a load first")
    return _named(path, LoadTrace, load[:, layers], tuple(layers.tolist()), {"source": "SGLang logical_count"})


def _read_npz(path: str | Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ConfigError(f"{path}: one bare array; expected an .npz archive with names")
        with file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the trace ({error.strerror or error}); check the path") from None
    except BROKEN_ARRAY as error:  # no archive, a broken one, or pickled objects in it
        raise ConfigError(f"{path}: no trace that can be read safely ({error}); write it with traces.save") from None
    head: dict[str, Any] = {}
    if "head" in arrays:
        try:
            head = json.loads(str(arrays.pop("head")))
            schema, found_kind = head["schema"], head["kind"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(f"{path}: the head of the trace is damaged; write it again with traces.save") from None
        if schema != SCHEMA:
            raise ConfigError(f"{path}: trace schema {schema}, this version reads {SCHEMA}; record or convert it again")
        if found_kind != kind:
            raise ConfigError(f"{path}: a {found_kind} trace where a {kind} trace is wanted; give the other file")
    return arrays, head


def _head_fields(head: dict[str, Any]) -> tuple[tuple[int, ...] | None, dict[str, Any]]:
    layers = head.get("layers")
    return (None if layers is None else tuple(layers)), head.get("metadata") or {}


def _named(path: str | Path, kind: type, *fields: Any) -> Any:
    try:
        return kind(*fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _check_layers(layers: tuple[int, ...] | None, num_layers: int, what: str) -> None:
    if layers is not None and (len(layers) != num_layers or list(layers) != sorted(set(layers))):
        raise ConfigError(f"{what}: layers {layers} must be {num_layers} increasing layer numbers")
