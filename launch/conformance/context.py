"""What probes share on one rank: its place, its island, and samples of data that every rank can draw for any other."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

import moe_runtime

from ...comm import formats
from ...comm.bridge import meet
from ...comm.islands import CompositeTransport
from ...comm.place import EMULATED
from ...comm.quirks import as_bytes, dtype_name
from ...comm.transport import LocalTransport, Transport
from ...comm.wire import all_gather_message
from ...core import environment
from ..machine import free_port
from .verdicts import WORKS, WRONG, Outcome

# The dtypes of the vendor table, those that every library has first.
DTYPES = tuple(
    getattr(torch, name)
    for name in (
        "float32 bfloat16 float16 int32 int64 uint8 int8 float64 bool int16 uint16 uint32 uint64 "
        "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
    ).split()
    if hasattr(torch, name)
)


GRACE_S = 5.0  # beyond a deadline that a library was given, for it to notice


@dataclass
class Context:
    """runtime: this rank's. control: a transport beside it, on which ranks agree what a probe has found.

    vendor_named: whether the user named the vendor. loaded_with_torch: the modules there after `import torch`.
    """

    runtime: moe_runtime.Runtime
    control: Transport
    deadline_s: float
    vendor_named: bool = False
    loaded_with_torch: frozenset[str] = frozenset()
    # What every rank said at the start, so that a probe need not ask: its kind, which wire formats it can, itself.
    kinds: list[str] = field(default_factory=list)
    able: list[dict[str, str]] = field(default_factory=list)
    about: list[dict[str, Any]] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)  # that every rank's device holds
    group: Any = None  # of the last probe of the library, and whether that probe came to its end
    group_ended: bool = True

    @property
    def place(self) -> Any:
        return self.runtime.place

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    @property
    def on_chip(self) -> bool:
        """Whether this rank drives a vendor's own device."""
        return self.device.type != "cpu" and not self.place.emulated

    @property
    def all_on_chips(self) -> bool:
        return not any(kind.startswith("cpu") or EMULATED in kind for kind in self.kinds)

    @property
    def namespace(self) -> Any:
        """torch.<device type>."""
        return getattr(torch, self.device.type)

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            self.namespace.synchronize()

    def gather(self, message: Any, phase: str) -> list[Any]:
        return all_gather_message(self.control, message, phase)


def open_context(runtime: moe_runtime.Runtime, deadline_s: float, **facts: Any) -> Context:
    """Every rank calls. deadline_s: of a probe; ranks wait for each other's word somewhat longer."""
    context = Context(runtime, _control(runtime, deadline_s + 3 * GRACE_S), deadline_s, **facts)
    mine = [runtime.place.kind, formats.claimed(runtime.place.vendor), sorted(map(dtype_name, _held(context)))]
    said = context.gather(mine, "check (kinds)")
    context.kinds = [kind for kind, _, _ in said]
    context.able = [able for _, able, _ in said]
    held = set.intersection(*(set(names) for _, _, names in said))
    context.dtypes = [dtype for dtype in DTYPES if dtype_name(dtype) in held]
    return context


def _control(runtime: moe_runtime.Runtime, deadline_s: float) -> Transport:
    """ZeroMQ, whatever the runtime's own transport is: a probe that spoils a group must not silence the ranks."""
    if runtime.size == 1:
        return LocalTransport(deadline_s)
    address = runtime.world.master_addr or "127.0.0.1"
    port = free_port(address) if runtime.rank == 0 else 0
    port = all_gather_message(runtime.transport, port, "check (control)")[0]
    about, secret = {"check": moe_runtime.__version__}, environment.job_secret()
    return meet(runtime.rank, runtime.size, address, port, deadline_s, about, secret=secret)


def _held(context: Context) -> list[torch.dtype]:
    """The dtypes that this rank's device can hold and give back."""
    held = []
    for dtype in DTYPES:
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            sent = sample(dtype, 64, 1)
            if same_bits(sent.to(context.device).cpu(), sent):
                held.append(dtype)
    return held


def join_alone() -> bool:
    """Make torch.distributed ready on a rank that is the only one of its island; whether it was that."""
    if dist.is_initialized():
        return False
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return True


def mates(context: Context) -> tuple[int, ...]:
    """The ranks of this rank's island."""
    transport = context.runtime.transport
    if isinstance(transport, CompositeTransport):
        return transport.islands.ranks[transport.islands.of(context.runtime.rank)]
    return tuple(range(context.runtime.size))


# ---------------------------------------------------------------- data

# Large enough that a narrowed or re-signed type shows.
_SCALE = {
    torch.int16: 1 << 8, torch.int32: 1 << 20, torch.int64: 1 << 33, torch.uint8: 2, torch.uint16: 1 << 8,
    torch.uint32: 1 << 25, torch.uint64: 1 << 40,
}  # fmt: skip
_FRACTION = {torch.float32: 2.0**-10, torch.float64: 2.0**-40}


def sample(dtype: torch.dtype, count: int, seed: int, ranks: int = 1) -> torch.Tensor:
    """CPU [count] of `dtype`, another for each seed; sums over `ranks` of them are exact in the dtype."""
    values = torch.randint(-60, 60, (count,), generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bool:
        return values > 0
    if dtype_name(dtype).startswith("float8"):
        return (values % 3 - 1).float().to(dtype) if ranks > 4 else (values % 5 - 2).float().to(dtype)
    if dtype_name(dtype).startswith("uint"):
        values = values + 60
    values = values.div(ranks, rounding_mode="floor")
    if dtype in _FRACTION:
        return (values.double() + _FRACTION[dtype]).to(dtype)
    return (values * _SCALE.get(dtype, 1)).to(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(as_bytes(one), as_bytes(other))


def compare(pairs: Sequence[tuple[str, torch.Tensor, torch.Tensor]]) -> Outcome:
    """From (what it is, what came, what was expected): works, or wrong with the first difference in words."""
    for what, got, expected in pairs:
        got = truth(got.detach().cpu())
        if not same_bits(got, expected):
            return Outcome(WRONG, f"wrong values {what}: {first_difference(got, expected)}")
    return Outcome(WORKS, "works")


def truth(tensor: torch.Tensor) -> torch.Tensor:
    """A bool tensor whose True is the byte 1: gloo's sum leaves other bytes (seen with torch 2.13). Others as given."""
    return tensor.view(torch.uint8) != 0 if tensor.dtype == torch.bool else tensor


def first_difference(got: torch.Tensor, expected: torch.Tensor) -> str:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{tuple(got.shape)} {dtype_name(got.dtype)}, not {tuple(expected.shape)} {dtype_name(expected.dtype)}"
    flat = [as_bytes(tensor).view(-1, tensor.element_size()) for tensor in (got, expected)]
    differing = (flat[0] != flat[1]).any(1).nonzero().view(-1)
    at = int(differing[0])
    one, other = (tensor.reshape(-1)[at].item() for tensor in (got, expected))
    return f"{len(differing)} of {got.numel()} elements, [{at}] is {one} and not {other}"
