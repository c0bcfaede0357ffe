"""Plans on disk: our JSON with a schema version, and the forms that SGLang, vLLM and vllm-ascend take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import ConfigError
from ...core.files import write_atomically
from ...core.placement import MOST, Placement
from .eplb import invert
from .model import Ranks
from .planner import Plan

SCHEMA = 1
_FIELDS = ("slot_expert", "slot_rank", "slot_share", "num_experts", "num_ranks")
_PLAN_FIELDS = ("cost", "fixed", "node", "load", "policy", "equal", "note")


def save_plan(plan: Placement, path: str | Path) -> None:
    """Writes a Plan, or a bare Placement, as JSON; the file appears whole or not at all. Numbers survive exactly."""
    _write_json(path, plan_to_dict(plan))


def load_plan(path: str | Path) -> Placement:
    """Reads what save_plan wrote: a Plan, or a Placement. Raises ConfigError: which file, what is wrong, what to do."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the plan ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}; write the plan again with save_plan") from None
    return plan_from_dict(found, path)


def plan_to_dict(plan: Placement) -> dict[str, Any]:
    """A Plan, or a bare Placement, as lists, numbers and strings: for a file, or a message to other ranks."""
    found: dict[str, Any] = {"schema": SCHEMA, "kind": "moe-runtime plan"}
    found |= {name: _plain(getattr(plan, name)) for name in _FIELDS}
    if plan.absent is not None:
        found["absent"] = [plan.absent_experts(layer) for layer in range(plan.num_layers)]
    if isinstance(plan, Plan):
        ranks = {name: _plain(getattr(plan.ranks, name)) for name in ("cost", "fixed", "node")}
        found["plan"] = ranks | {name: _plain(getattr(plan, name)) for name in ("load", "policy", "equal", "note")}
    return found


def plan_from_dict(found: Any, path: str | Path) -> Placement:
    """The Plan or Placement that plan_to_dict took apart. Raises ConfigError; `path` says whence it came."""
    if not isinstance(found, dict) or found.get("kind") != "moe-runtime plan":
        raise ConfigError(f"{path}: no plan of moe-runtime; write it with save_plan")
    if found.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: plan schema {found.get('schema')!r}, this version reads {SCHEMA}; plan again")
    parts = found.get("plan")
    missing = [name for name in _FIELDS if name not in found]
    missing += [f"plan.{name}" for name in _PLAN_FIELDS if isinstance(parts, dict) and name not in parts]
    if missing:
        raise ConfigError(f"{path}: {missing[0]} missing; write the plan again with save_plan")
    try:
        slot_rank = np.array(found["slot_rank"], dtype=np.int32)
        fields = (
            np.array(found["slot_expert"], dtype=np.int32),
            slot_rank,
            np.array(found["slot_share"], dtype=np.float64),
            int(found["num_experts"]),
            int(found["num_ranks"]),
        )
        absent = None if found.get("absent") is None else _read_absent(found["absent"], len(fields[0]), fields[3])
        placed = Placement(*fields, absent=absent)  # its numbers are bounded from here on
        if not isinstance(parts, dict):
            return placed
        slots = np.bincount(slot_rank, minlength=fields[4]).astype(np.int64)
        cost, fixed = (np.array(parts[name], dtype=np.float64) for name in ("cost", "fixed"))
        ranks = Ranks(cost, fixed, slots, np.array(parts["node"], dtype=np.int64))
        load = np.array(parts["load"], dtype=np.float64)
        if (
            load.shape != (len(fields[0]), fields[3])
            or not cost.shape == fixed.shape == ranks.node.shape == slots.shape
        ):
            raise ConfigError("the load or the ranks do not fit the slots")
        words = str(parts["policy"]), bool(parts["equal"]), str(parts["note"])
        return Plan(*fields, ranks, load, *words, absent=absent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; write the plan again with save_plan") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: a table of the plan is damaged ({error}); write it again with save_plan") from None


def _read_absent(lists: Any, num_layers: int, num_experts: int) -> np.ndarray:
    """[L, E] bool from lists of experts, one for each layer."""
    if not 0 < num_experts <= MOST or num_layers * num_experts > MOST * 16:
        raise ConfigError(f"absent experts of {num_layers} layers of {num_experts}: too many")
    if not isinstance(lists, list) or len(lists) != num_layers:
        raise ConfigError(f"absent must be {num_layers} lists of experts, one for each layer")
    absent = np.zeros((num_layers, num_experts), dtype=np.bool_)
    for layer, experts in enumerate(lists):
        for expert in experts:
            if not isinstance(expert, int) or isinstance(expert, bool) or not 0 <= expert < num_experts:
                raise ConfigError(f"absent: layer {layer} names {expert!r}, which is no expert (0..{num_experts - 1})")
            absent[layer, expert] = True
    return absent


def export_sglang(plan: Placement, path: str | Path, layers: Sequence[int] | None = None, num_layers: int = 0) -> None:
    """Writes {"physical_to_logical_map": [layers][S]}, for SGLang's --init-expert-location.

    SGLang counts all layers of the model and takes equal numbers of slots per rank and equal shares. `layers`: the
    numbers of the plan's MoE layers in the model (as in a LoadTrace); the others, up to `num_layers`, get experts in
    order. Raises ConfigError when ranks hold unequal numbers of slots.
    """
    _equal_slots(plan, "SGLang")
    _write_json(path, {"physical_to_logical_map": _all_layers(plan, layers, num_layers).tolist()})


def export_vllm(plan: Placement, path: str | Path) -> None:
    """Writes the three tables of vLLM's EPLB state, MoE layers only, as JSON.

    physical_to_logical_map [L][S], logical_to_physical_map [L][E][X] padded with -1, logical_replica_count [L][E].
    vLLM reads no file of these itself: pass them where its rebalance_experts would return them. Needs equal numbers
    of slots per rank; shares are equal there.
    """
    _equal_slots(plan, "vLLM")
    slots, count = invert(plan.slot_expert, plan.num_experts)
    _write_json(
        path,
        {
            "physical_to_logical_map": plan.slot_expert.tolist(),
            "logical_to_physical_map": slots.tolist(),
            "logical_replica_count": count.tolist(),
        },
    )


def export_vllm_ascend(plan: Placement, path: str | Path) -> None:
    """Writes vllm-ascend's expert map: for each MoE layer the experts of each device."""
    _equal_slots(plan, "vllm-ascend")
    layer_list = [
        {
            "layer_id": layer,
            "device_count": plan.num_ranks,
            "device_list": [
                {"device_id": rank, "device_expert": plan.rank_experts(layer, rank)} for rank in range(plan.num_ranks)
            ],
        }
        for layer in range(plan.num_layers)
    ]
    _write_json(path, {"moe_layer_count": plan.num_layers, "layer_list": layer_list})


def _all_layers(plan: Placement, layers: Sequence[int] | None, num_layers: int) -> np.ndarray:
    layers = list(range(plan.num_layers)) if layers is None else list(layers)
    if len(layers) != plan.num_layers or any(layer < 0 for layer in layers):
        raise ConfigError(f"export: {len(layers)} layer numbers for a plan of {plan.num_layers} layers")
    table = np.tile(np.arange(plan.num_slots) % plan.num_experts, (max(num_layers, max(layers) + 1), 1))
    table[layers] = plan.slot_expert
    return table


def _equal_slots(plan: Placement, whose: str) -> None:
    if plan.absent is not None:
        raise ConfigError(f"export: {whose} needs every expert in some slot; {plan.say_absent()}")
    counts = np.bincount(plan.slot_rank, minlength=plan.num_ranks)
    if np.ptp(counts):
        raise ConfigError(
            f"export: {whose} takes equal numbers of slots per rank, this plan has {counts.min()} to {counts.max()}; "
            "plan with the same slots for every rank"
        )


def _write_json(path: str | Path, found: dict[str, Any]) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(found).encode()))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
