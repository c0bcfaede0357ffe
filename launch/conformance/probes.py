"""The list of probes: what is tried on every rank, and what the vendor table claims of each.

Probes of the library itself come last, because they may spoil it; the report puts them in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ...comm.quirks import dtype_name
from ...comm.vendors import Vendor
from ...core import environment
from ...core.cluster import Cluster
from . import claims, collectives, device, dispatching, exchange, measure
from .context import Context
from .verdicts import MEASURED, SKIPPED, WORKS, WRONG, Outcome


@dataclass(frozen=True)
class Probe:
    """run: on every rank. claim: of a vendor; None: a probe of the whole world, about which no vendor claims anything.

    required, numerics: see verdicts.Subject.
    """

    group: str
    what: str
    run: Callable[[Context], Outcome]
    claim: Callable[[Vendor], claims.Claims] | None = None
    required: bool = False
    numerics: bool = False


def probes(cluster: Cluster | None, on_chips: bool) -> list[Probe]:
    """All probes in the order in which they run. cluster: the user's own file. on_chips: whether all ranks are."""
    beside = _cluster(cluster) if cluster else ()
    return [*beside, *_device(), *_transport(), *_dispatch(), *_measured(on_chips), *_collectives()]


def _cluster(cluster: Cluster) -> Iterator[Probe]:
    yield Probe("cluster", "ranks met", _met, required=True)
    yield Probe("cluster", "versions", _versions, required=True)
    yield Probe("cluster", "memory of the cluster file", _memory_of(cluster), required=True)
    for words in ("exact", "fp8,int8,exact"):
        for dtype in (torch.float32, torch.bfloat16):
            yield Probe("cluster", f"wire formats for {words!r}, {dtype_name(dtype)} rows", _agreed(words, dtype))


def _agreed(words: str, dtype: torch.dtype) -> Callable[[Context], Outcome]:
    def run(context: Context) -> Outcome:
        return Outcome(MEASURED, "; ".join(dispatching.describe_agreement(context, words.split(","), dtype)))

    return run


def _met(context: Context) -> Outcome:
    return Outcome(WORKS, f"{context.runtime.size} ranks on {len(set(context.kinds))} islands")


def _versions(context: Context) -> Outcome:
    """Nodes may differ in all of them."""
    told = {
        name: ", ".join(dict.fromkeys(rank[name] for rank in context.about))
        for name in ("moe_runtime", "torch", "python")
    }
    return Outcome(WORKS, "; ".join(f"{name} {versions}" for name, versions in told.items()))


def _memory_of(cluster: Cluster) -> Callable[[Context], Outcome]:
    """Whether a device has nine tenths of what its node's memory_gib promises."""

    def run(context: Context) -> Outcome:
        promised = cluster.rank_nodes()[context.runtime.rank].memory_gib
        if promised is None:
            return Outcome(SKIPPED, "the cluster file gives no memory_gib")
        if not context.on_chip:
            return Outcome(SKIPPED, "no chip of its own to compare memory_gib with")
        gib = device.total_memory(context)[1] / device.GIB
        return Outcome(WORKS if gib >= 0.9 * promised else WRONG, f"{gib:.1f} GiB; the file says {promised:g}")

    return run


def _device() -> Iterator[Probe]:
    facts: list[tuple[str, Callable[[Context], Outcome], Callable[[Vendor], claims.Claims]]] = [
        ("vendor by detection", device.detection, _identified),
        ("plug-in module", device.plugin, lambda v: claims.value_of(v.plugin_modules, lambda n: n or ("none needed",))),
        ("plug-in loads with torch", device.autoload, lambda v: claims.value_of(v.autoload)),
        ("device type", device.device_type, lambda v: claims.value_of(v.device_type)),
        ("namespace", device.namespace, lambda v: claims.value_of(v.device_namespace)),
        ("memory query", device.memory, lambda v: claims.value_of(v.memory_query)),
        ("visible-devices variable", device.visible_devices, lambda v: claims.value_of(v.visible_devices, lambda n: n)),
    ]
    for what, run, claim in facts:
        yield Probe("device", what, run, claim)
    yield Probe("device", "count and name", device.name_and_count, _nothing)
    yield Probe("device", "pinned host memory", device.pinned, _nothing)
    for dtype in device.CAST_DTYPES:
        name = dtype_name(dtype)
        needed = not name.startswith("float8")
        yield Probe("device", device.dtype_label(dtype), device.casts(dtype), _of(claims.stores, name), needed, True)
    yield Probe("device", "float64 stored", device.float64, _of(claims.stores, "float64"), numerics=True)
    for name in device.WIRE_FORMATS:
        run = device.wire_format(name)
        yield Probe("device", f"rows as {name}", run, _of(claims.wire_format, name), numerics=True)


def _identified(vendor: Vendor) -> claims.Claims:
    return claims.value_of(vendor.identification, lambda marks: (vendor.name,))


def _nothing(vendor: Vendor) -> claims.Claims:
    return ()


def _of(claim: Callable[[Vendor, str], claims.Claims], name: str) -> Callable[[Vendor], claims.Claims]:
    return lambda vendor: claim(vendor, name)


def _transport() -> Iterator[Probe]:
    for what, run in {
        "all_to_all_v, uneven and empty": exchange.for_every_dtype(exchange.all_to_all),
        "all_gather": exchange.for_every_dtype(exchange.all_gather),
        "broadcast": exchange.for_every_dtype(exchange.broadcast),
        "send, recv": exchange.for_every_dtype(exchange.send_and_receive),
        "all_reduce: sum, max, min": exchange.for_every_dtype(exchange.all_reduce, exchange.REDUCED),
        "barrier": exchange.barrier,
    }.items():
        yield Probe("transport", what, run, required=True)


def _dispatch() -> Iterator[Probe]:
    for dtype, expand in dispatching.EXACT:
        run = dispatching.exact(dtype, expand)
        yield Probe("dispatch", f"{dtype_name(dtype)}, expand={expand}", run, required=True)
    for name in dispatching.WIRES:
        yield Probe("dispatch", f"float32 rows as {name}", dispatching.over_the_wire(name), required=True)


def _measured(on_chips: bool) -> Iterator[Probe]:
    yield Probe("measured", "copy on the device", measure.device_copy, _nothing)
    yield Probe("measured", "copy from host to device", measure.host_copy(True), _nothing)
    yield Probe("measured", "copy from device to host", measure.host_copy(False), _nothing)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield Probe("measured", f"matrix product, {dtype_name(dtype)}", measure.product(dtype), _nothing)
    for what, size in (("1 KiB", 1024), ("8 MiB", 8 * measure.MIB) if on_chips else ("1 MiB", measure.MIB)):
        yield Probe("measured", f"all_to_all_v, {what} to each rank", measure.exchange(size))


def _collectives() -> Iterator[Probe]:
    """The plain calls first, those that a library may choke on last."""
    fresh, presized = collectives.on_fresh_group, environment.presized_all_to_all_bytes() is not None

    def uneven(vendor: Vendor) -> claims.Claims:
        return claims.uneven(vendor, presized)

    yield Probe("collectives", "backend registered", _backend, lambda v: claims.value_of(v.backend))
    f32 = torch.float32
    for what, body, claim, required, alone in (
        ("all_to_all_single, even", collectives.exchange(f32), _nothing, True, True),
        ("all_gather", collectives.all_gather, _nothing, True, True),
        ("broadcast", collectives.broadcast, _nothing, True, True),
        ("barrier", collectives.barrier, _nothing, True, True),
        *((f"all_reduce, {op}", collectives.reduce(f32, op), _nothing, True, True) for op in ("sum", "max", "min")),
        ("send, recv", collectives.send_and_receive, _nothing, True, False),
        ("all_to_all_single, uneven", collectives.exchange_uneven(lambda s, t: 1 + (s + 2 * t) % 3), uneven, 0, False),
        ("all_to_all_single, zero counts", collectives.exchange_uneven(lambda s, t: (s + t) % 2), uneven, 0, False),
    ):
        yield Probe("collectives", what, fresh(body, alone), claim, bool(required))
    for dtype, run in collectives.moving():
        yield Probe(
            "collectives", f"all_to_all_single of {dtype_name(dtype)}", run, _of(claims.moves, dtype_name(dtype))
        )
    for dtype, run in collectives.reducing():
        yield Probe("collectives", f"all_reduce of {dtype_name(dtype)}", run, _of(claims.reduces, dtype_name(dtype)))
    # Where no quirk pads sizes, the runtime sends odd ones: it needs them.
    for what, body, claim, required, alone in (
        ("all_reduce, avg", collectives.reduce(f32, "avg"), claims.average, False, True),
        ("all_to_all_single, odd sizes", collectives.exchange(torch.uint8, 509), claims.odd_sizes, True, True),
        ("all_to_all_single, strided", collectives.exchange(f32, stride=2), claims.strided, False, True),
        ("all_reduce, strided", collectives.reduce(f32, "sum", stride=2), claims.strided, False, True),
        ("gather", collectives.gather, claims.gather, False, True),
        ("batch_isend_irecv", collectives.batch, claims.batch, False, False),
        ("recv from any rank", collectives.receive_from_any, claims.any_source, False, False),
    ):
        yield Probe("collectives", what, fresh(body, alone), claim, required)


def _backend(context: Context) -> Outcome:
    name, own = context.place.backend, context.place.vendor.backend.value
    if context.place.emulated and name != own:
        return Outcome(SKIPPED, f"torch has {own!r} itself; emulated as {name!r}")
    registered = torch.distributed.is_backend_available(name)
    return Outcome(name if registered else "not registered", name if registered else f"{name} is not registered")
