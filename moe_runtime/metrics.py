"""What a rank says of itself ten times a second: numbers for people and for Prometheus, as msgpack types.

Counters only: sums since this rank loaded its model, which whoever reads two of them makes rates of. Nothing here
talks to other ranks or to the device.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model import expert_layers

if TYPE_CHECKING:
    from .layer import LayerState
    from .runtime import Runtime

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

# The field of LayerState -> its name here. All are sums over layers.
_OF_LAYERS = {
    "rows_computed": "rows",
    "rows_sent": "rows_sent",
    "rows_received": "rows_received",
    "expert_seconds": "experts_s",
    "dispatch_seconds": "dispatch_s",
    "combine_seconds": "combine_s",
}

_modules_of: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()


def collect(runtime: Runtime, model: Any, tokens: int = 0, requests: int = 0) -> dict[str, Any]:
    """This rank's counters. tokens, requests: that it has generated and ended so far, which the caller knows.

    passes: forward passes; those without tokens of this rank's count too. rows: (token, expert) pairs computed.
    experts_s, dispatch_s, combine_s: seconds there, forward only, waits for others included. wait_s: seconds of waiting
    for each peer's rows by rank number; waits_exact: whether the transport knows who was late. speed: of the cluster
    file. dropped, renormalised: selections of experts that no rank held, and tokens (in each layer) that went on with
    the weights of the rest. The process's own numbers are left out where there is no /proc.
    """
    layers = _layers(model)
    ranks, waits = runtime.view.ranks, runtime.transport.waits
    counters: dict[str, Any] = {"passes": layers[0].passes, "tokens": tokens, "requests": requests}
    for name, told in _OF_LAYERS.items():
        counters[told] = sum([getattr(layer, name) for layer in layers])
    counters["dropped"] = sum([layer.lacking.selections for layer in layers])
    counters["renormalised"] = sum([layer.lacking.touched for layer in layers])
    counters["wait_s"] = {ranks[at]: seconds for at, seconds in enumerate(waits.total_s) if waits.count[at]}
    counters["waits_exact"] = waits.exact
    counters["speed"] = runtime.rank_speeds[runtime.rank]
    return counters | process_numbers()


def watch_progress(model: Any, progress: dict[str, Any] | None) -> None:
    """Have all expert layers write what they are doing into `progress` (LayerState.note); None ends it."""
    for layer in _layers(model):
        layer.progress = progress


def process_numbers() -> dict[str, int]:
    """Resident bytes, threads and open files of this process; {} without /proc."""
    try:
        # After the name, which may hold anything up to the last bracket: field 3 of proc(5)'s table and on.
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        # Since Linux 6.2 the folder's size is how many there are; before, it is 0 and they are counted.
        files = os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        return {}
    return {"memory_bytes": int(fields[21]) * _PAGE_BYTES, "threads": int(fields[17]), "open_files": files}


def _layers(model: Any) -> list[LayerState]:
    """The states of the model's expert layers; looked for once, since a large model has thousands of modules."""
    if model not in _modules_of:
        _modules_of[model] = expert_layers(model)
    return [module.moe_runtime_layer for module in _modules_of[model]]
