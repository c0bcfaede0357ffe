"""The vendor's collective library emulated: a torch.distributed backend of the vendor's name, over gloo on host memory.

It owns the calls, counts them, and enforces the documented limits (limits.py) before anything is sent. It refuses
members of another vendor by name. Deadlines and their error texts are gloo's.
"""

# torch's groups take each call in several forms; torch.distributed's functions use the one that is here.
# mypy: disable-error-code="override"

from __future__ import annotations

import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ...core import environment
from ...core.errors import VendorUnavailable
from ..quirks import require_operation
from ..vendors import VENDORS, Quirk, Vendor
from .limits import check_payload, check_reduction, check_splits, refuse
from .work import EmulatedWork, HostMemory, data_of, on_host

_TORCHS_OWN = frozenset({"nccl", "gloo", "mpi", "ucc", "xccl", "fake"})

# What gloo reduces as it is; the others are reduced in a wider type that holds every value, and their sums wrap alike.
_GLOO_REDUCES = frozenset(
    {torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64}
)
_WIDER = {torch.bool: torch.int32, torch.int16: torch.int32, torch.uint16: torch.int32, torch.uint32: torch.int64}


def backend_name(vendor: Vendor | str) -> str:
    """The name to give to torch.distributed: the vendor's own, or emulated_<name> where torch has that name itself."""
    row = VENDORS[vendor] if isinstance(vendor, str) else vendor
    own = row.backend.value
    return f"emulated_{own}" if own in _TORCHS_OWN else own


def register(vendor: Vendor, device_type: str) -> None:
    """Make `backend_name(vendor)` a backend of torch.distributed in this process, for tensors on `device_type`."""

    def create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> EmulatedGroup:
        return EmulatedGroup(vendor, device_type, store, rank, size, timeout)

    dist.Backend.register_backend(backend_name(vendor), create, devices=[device_type])


class EmulatedGroup(dist.ProcessGroup):
    """Ranks of one emulated vendor. `calls` and `bytes` count, by the name of the call, what this rank gave to it."""

    def __init__(
        self, vendor: Vendor, device_type: str, store: dist.Store, rank: int, size: int, timeout: timedelta
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.vendor = vendor
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._device_type = device_type
        self._name = self._description = ""
        # torch puts the device type into the prefix, and ranks of another vendor have another: meet one level above.
        shared = store.underlying_store if isinstance(store, dist.PrefixStore) else store
        _compare_vendors(vendor, dist.PrefixStore("emulated_vendor/", shared), rank, size, timeout)
        self._gloo: Any = dist.ProcessGroupGloo(dist.PrefixStore("emulated_gloo/", store), rank, size, timeout)

    # ------------------------------------------------------------ what torch asks of a group

    def getBackendName(self) -> str:
        return f"{backend_name(self.vendor)} (emulated)"

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupName(self) -> str:
        return self._name

    def setGroupDesc(self, description: str) -> None:
        self._description = description

    def getGroupDesc(self) -> str:
        return self._description

    # torch looks for a Backend inside a group; a group of Python's making is its own.
    supports_splitting = False
    supports_coalescing = False

    def _get_backend(self, device: torch.device) -> EmulatedGroup:
        return self

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(self._device_type)]

    def shutdown(self) -> None:
        self._gloo = None

    def abort(self) -> None:
        self._gloo = None

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self._open()._set_default_timeout(timeout)

    set_timeout = _set_default_timeout

    # ------------------------------------------------------------ exchanges

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        opts: Any = None,
    ) -> EmulatedWork:
        limit = environment.presized_all_to_all_bytes()
        for splits, tensor in ((output_splits, output), (input_splits, input)):
            self._check("all_to_all_single", tensor)
            check_splits(self.vendor, splits, tensor, self.size(), limit)
        received, given = HostMemory(output), HostMemory(input)
        work = self._open().alltoall_base(
            received.data, given.data, list(output_splits), list(input_splits), opts or dist.AllToAllOptions()
        )
        return self._started("all_to_all_single", work, [given], [received])

    # The name before torch 2.13.
    alltoall_base = all_to_all_single  # type: ignore

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> Any:
        self._check("all_gather", *inputs, *(tensor for tensors in outputs for tensor in tensors))
        received, given = [[HostMemory(tensor) for tensor in tensors] for tensors in outputs], on_host(inputs)
        work = self._open().allgather([data_of(hosts) for hosts in received], data_of(given), *_given(opts))
        return self._started("all_gather", work, given, [host for hosts in received for host in hosts])

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> EmulatedWork:
        return self.allgather([list(output.view(self.size(), *input.shape).unbind(0))], [input], opts)

    _allgather_base = all_gather_single

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> EmulatedWork:
        self._check("broadcast", *tensors)
        hosts = on_host(tensors)
        return self._started("broadcast", self._open().broadcast(data_of(hosts), *_given(opts)), hosts, hosts)

    def send(self, tensors: list[torch.Tensor], to: int, tag: int = 0) -> EmulatedWork:
        self._check_batch()
        self._check("send", *tensors)
        hosts = on_host(tensors)
        return self._started("send", self._open().send(data_of(hosts), to, tag), hosts, [])

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int = 0) -> EmulatedWork:
        self._check_batch()
        self._check("recv", *tensors)
        hosts = on_host(tensors)
        return self._started("recv", self._open().recv(data_of(hosts), source, tag), [], hosts)

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int = 0) -> EmulatedWork:
        require_operation(self.vendor, "recv_any_source")
        self._check("recv", *tensors)
        hosts = on_host(tensors)
        return self._started("recv", self._open().recv_anysource(data_of(hosts), tag), [], hosts)

    def gather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> Any:
        require_operation(self.vendor, "gather")
        self._check("gather", *inputs, *(tensor for tensors in outputs for tensor in tensors))
        received, given = [[HostMemory(tensor) for tensor in tensors] for tensors in outputs], on_host(inputs)
        work = self._open().gather([data_of(hosts) for hosts in received], data_of(given), *_given(opts))
        return self._started("gather", work, given, [host for hosts in received for host in hosts])

    def scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any = None) -> Any:
        require_operation(self.vendor, "scatter")
        self._check("scatter", *outputs, *(tensor for tensors in inputs for tensor in tensors))
        received, given = on_host(outputs), [[HostMemory(tensor) for tensor in tensors] for tensors in inputs]
        work = self._open().scatter(data_of(received), [data_of(hosts) for hosts in given], *_given(opts))
        return self._started("scatter", work, [host for hosts in given for host in hosts], received)

    # ------------------------------------------------------------ reductions

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> EmulatedWork:
        opts = opts or dist.AllreduceOptions()
        average = opts.reduceOp == dist.ReduceOp.AVG
        self._check("all_reduce", *tensors)
        for tensor in tensors:
            check_reduction(self.vendor, "all_reduce", tensor.dtype, average)
        hosts = [HostMemory(tensor, whole=True) for tensor in tensors]
        wide = [self._reducible(host.data) for host in hosts]
        if average:
            opts.reduceOp = dist.ReduceOp.SUM
        work = self._open().allreduce(wide, opts)

        def finish() -> None:
            for host, values in zip(hosts, wide, strict=True):
                if average:
                    values.div_(self.size(), rounding_mode=None if values.is_floating_point() else "trunc")
                if values is not host.data:
                    host.data.copy_(values)

        return self._started("all_reduce", work, hosts, hosts, finish)

    def barrier(self, opts: Any = None) -> EmulatedWork:
        # gloo's own barrier takes no deadline; a sum of one element does.
        return self._started("barrier", self._open().allreduce([torch.zeros(1)]), [], [])

    def _reducible(self, data: torch.Tensor) -> torch.Tensor:
        if data.dtype in _GLOO_REDUCES:
            return data
        if data.dtype not in _WIDER:
            refuse(self.vendor, "all_reduce", f"the emulation has no way to reduce {data.dtype} (gloo lacks it)")
        return data.to(_WIDER[data.dtype])

    # ------------------------------------------------------------ what is not emulated

    def _missing(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(self.vendor, "this call", "not emulated; there are all_to_all_single, all_gather, broadcast, send, "
               "recv, gather, scatter, all_reduce and barrier")  # fmt: skip

    alltoall = reduce = reduce_scatter = reduce_scatter_single = _reduce_scatter_base = _missing
    allreduce_coalesced = allgather_coalesced = _missing

    # ------------------------------------------------------------ shared

    def _open(self) -> Any:
        if self._gloo is None:
            raise RuntimeError(f"the emulated group of {self.vendor.title} is closed")
        return self._gloo

    def _check(self, call: str, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            check_payload(self.vendor, call, tensor, self._device_type)

    def _check_batch(self) -> None:
        # torch issues a batch as single sends and receives, and tells a group of Python's making nothing about it.
        if Quirk.NO_P2P_BATCH in self.vendor.quirks and _called_by(dist.batch_isend_irecv):
            require_operation(self.vendor, "batch_isend_irecv")

    def _started(
        self,
        call: str,
        work: dist.Work,
        given: list[HostMemory],
        received: list[HostMemory],
        finish: Callable[[], None] = lambda: None,
    ) -> EmulatedWork:
        self.calls[call] += 1
        self.bytes[call] += sum(host.data.nbytes for host in given)

        def give_back() -> None:
            finish()
            for host in received:
                host.give_back()

        return EmulatedWork(work, [host.tensor for host in received], give_back)


def _given(opts: Any) -> list[Any]:
    return [] if opts is None else [opts]


def _called_by(function: Any) -> bool:
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is function.__code__:
            return True
        frame = frame.f_back
    return False


def _compare_vendors(vendor: Vendor, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
    """Return when all `size` ranks have named this vendor. VendorUnavailable names the first that named another."""
    deadline = time.monotonic() + timeout.total_seconds()
    store.set(str(rank), vendor.name)
    strangers = []
    for other in range(size):
        left = timedelta(seconds=max(0.001, deadline - time.monotonic()))
        try:
            store.wait([str(other)], left)
        except dist.DistStoreError as error:
            raise dist.DistStoreError(
                f"emulated {vendor.collective_library.value}: rank {other} did not join the group of rank {rank} "
                f"within {timeout.total_seconds():g} s"
            ) from error
        name = store.get(str(other)).decode()
        if name != vendor.name:
            strangers.append((other, name))
    if strangers:
        _let_others_read(store, rank, size, min(deadline, time.monotonic() + 5))
        other, name = strangers[0]
        raise VendorUnavailable(
            f"emulated {vendor.collective_library.value} joins ranks of {vendor.name} only: rank {rank} is "
            f"{vendor.name}, rank {other} is {name}; ranks of two vendors meet over the bridge"
        )


def _let_others_read(store: dist.Store, rank: int, size: int, deadline: float) -> None:
    """The store ends with the rank that serves it, by custom the first: it stays until all have read."""
    try:
        store.add("read", 1)
        while rank == 0 and store.add("read", 0) < size and time.monotonic() < deadline:
            time.sleep(0.02)
    except dist.DistError:
        return  # another rank served the store and is gone; this one has read all that it needs
