"""The one importer of mpi4py: how ranks that mpirun started find each other, and a transport over MPI itself.

Everything waits by polling nonblocking requests, because MPI's own waits know no deadline. Tensors are handed to MPI
as the bytes they lie in, without copies. Objects are never sent: mpi4py would pickle them.
"""

from __future__ import annotations

import atexit
import math
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core.errors import ConfigError, MoeRuntimeError, PeerLost, PeerTimeout, VendorUnavailable
from .group import listen
from .transport import InHalves, Waits, byte_view, check_counts, check_peer, describe_counts, once

_ROWS, _MESSAGE = 1, 2  # tags: rows of collectives, send and recv
_PIECE_BYTES = 1 << 30  # MPI before version 4 counts in int32, and Open MPI 5 still does
_PIECE_ELEMENTS = 1 << 27
_SPIN_S = 0.002  # polled without a pause this long, and longer for many bytes: MPI moves them inside Test()
_SPIN_BYTES_PER_S = 1e9
_PAUSES_S = (20e-6, 500e-6)

# Requests that have not ended. MPI may still write into their buffers, so they are not let go before. While there are
# any, or after a failure, MPI_Finalize, which would wait for other ranks without a deadline, is not called.
_under_way: set[_Pending] = set()
_failures: list[str] = []


def connect(deadline_s: float) -> MpiTransport:
    """A transport over all ranks that mpirun started. Every rank calls it; it returns when all have come.

    Raises VendorUnavailable when no MPI library can be loaded, PeerTimeout when some rank has not come in time.
    """
    return MpiTransport(_load_mpi().COMM_WORLD, deadline_s)


class MpiTransport(InHalves):
    """Ranks of an MPI communicator, in its order; CPU tensors.

    Rows travel as one message per pair of ranks, not as Alltoallv: MPI libraries build Alltoallv from such messages
    on the CPU as well, an error can name the very ranks that are missing, and no displacement overflows int32.
    An exchange that was started goes on whenever this process is inside a call of MPI; most libraries move little
    between calls, except small messages, which are in the receiver's memory once sent.

    A rank that dies: its launcher ends the whole job, unless told otherwise. Under `mpirun --with-ft ulfm` the others
    get PeerLost at once, and under `--continuous` PeerTimeout at the deadline. A rank that closes its transport stays
    connected to MPI until it exits; others that still wait for it get PeerTimeout.
    """

    def __init__(self, communicator: Any, deadline_s: float) -> None:
        self._mpi = _load_mpi()
        library = self._mpi.Get_library_version().split(",")[0].split("\n")[0].strip()
        self.name = f"mpi:{library}"
        self.rank, self.size, self.deadline_s = communicator.Get_rank(), communicator.Get_size(), deadline_s
        self.waits = Waits(self.size)
        self._unusable: str | None = None
        # A communicator of its own: no message of the caller's can match one of ours.
        self._communicator, request = communicator.Idup()
        self._finish([_Pending(request, self._others())], "rendezvous")
        self._communicator.Set_errhandler(self._mpi.ERRORS_RETURN)

    def start_all_to_all_v(
        self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], phase: str
    ) -> Callable[[], torch.Tensor]:
        # Several may be under way: MPI keeps messages of one sender and tag in the order in which they were started.
        check_counts(self, send, send_counts, recv_counts, phase)
        recv = send.new_empty((sum(recv_counts), *send.shape[1:]))
        outgoing = [byte_view(part) for part in send.detach().split(list(send_counts))]
        incoming = [byte_view(part) for part in recv.split(list(recv_counts))]
        detail = describe_counts(send_counts, recv_counts)
        pending = self._start_exchange(outgoing, incoming, phase, detail)

        def finish() -> torch.Tensor:
            self._check_usable(phase)
            self._finish(pending, phase, detail, self.waits)
            return recv

        return once(finish, phase)

    def all_reduce(self, tensor: torch.Tensor, phase: str, op: str = "sum") -> None:
        operations = {"sum": self._mpi.SUM, "max": self._mpi.MAX, "min": self._mpi.MIN}
        if op not in operations:
            raise ConfigError(f"all_reduce: op must be one of {', '.join(operations)}, got {op!r}")
        # MPI has no 16-bit floats: they travel and are summed as float32, and rounded once.
        narrow = tensor.dtype in (torch.bfloat16, torch.float16)
        wide = tensor.detach().float() if narrow else tensor.detach()
        values = wide.view(-1).numpy()
        self._check_usable(phase)
        self._run(
            lambda: [
                _Pending(
                    self._communicator.Iallreduce(self._mpi.IN_PLACE, piece, operations[op]),
                    self._others(),
                    piece.nbytes,
                )
                for piece in _pieces(values, _PIECE_ELEMENTS)
            ],
            phase,
            f"all_reduce of {tuple(tensor.shape)} {tensor.dtype}",
        )
        if narrow:
            tensor.detach().copy_(wide)

    def all_gather(self, tensor: torch.Tensor, phase: str) -> torch.Tensor:
        out = tensor.new_empty((self.size, *tensor.shape))
        mine = byte_view(tensor)
        detail = f"all_gather of {tuple(tensor.shape)} {tensor.dtype}"
        incoming = [byte_view(part) for part in out.unbind(0)]
        self._finish(self._start_exchange([mine] * self.size, incoming, phase, detail), phase, detail)
        return out

    def broadcast(self, tensor: torch.Tensor, root: int, phase: str) -> None:
        self._check_usable(phase)
        waits_for = self._others() if self.rank == root else (root,)
        self._run(
            lambda: [
                _Pending(self._communicator.Ibcast([piece, self._mpi.BYTE], root), waits_for, piece.nbytes)
                for piece in _pieces(byte_view(tensor), _PIECE_BYTES)
            ],
            phase,
            f"broadcast of {tuple(tensor.shape)} {tensor.dtype} from rank {root}",
        )

    def send(self, tensor: torch.Tensor, to: int, phase: str) -> None:
        check_peer(self, to, phase)
        self._check_usable(phase)
        detail = f"sending {tuple(tensor.shape)} {tensor.dtype} to rank {to}"
        self._run(lambda: self._send(byte_view(tensor), to, _MESSAGE), phase, detail)

    def recv(self, tensor: torch.Tensor, source: int, phase: str) -> None:
        check_peer(self, source, phase)
        self._check_usable(phase)
        detail = f"receiving {tuple(tensor.shape)} {tensor.dtype} from rank {source}"
        self._run(lambda: self._receive(byte_view(tensor), source, _MESSAGE), phase, detail)

    def barrier(self, phase: str) -> None:
        self._check_usable(phase)
        self._run(lambda: [_Pending(self._communicator.Ibarrier(), self._others())], phase)

    def close(self) -> None:
        # MPI_Comm_free is collective and may wait for a rank that is dead; MPI frees the communicator when it ends.
        self._unusable = self._unusable or "it is closed"

    def _start_exchange(
        self, outgoing: list[np.ndarray], incoming: list[np.ndarray], phase: str, detail: str
    ) -> list[_Pending]:
        """Bytes to every rank and from every rank; also none, so that ranks meet in every exchange."""
        self._check_usable(phase)

        def start() -> list[_Pending]:
            received = [self._receive(incoming[rank], rank, _ROWS) for rank in self._others()]
            sent = [self._send(outgoing[rank], rank, _ROWS) for rank in self._others()]
            return [pending for part in (*received, *sent) for pending in part]

        if len(outgoing[self.rank]) != len(incoming[self.rank]):
            raise ConfigError(f"{phase}: rank {self.rank} does not agree with itself, {detail}")
        incoming[self.rank][:] = outgoing[self.rank]
        return self._start(start, phase, detail)

    def _send(self, data: np.ndarray, to: int, tag: int) -> list[_Pending]:
        return [
            _Pending(self._communicator.Isend([piece, self._mpi.BYTE], to, tag), (to,), piece.nbytes)
            for piece in _pieces(data, _PIECE_BYTES)
        ]

    def _receive(self, data: np.ndarray, source: int, tag: int) -> list[_Pending]:
        return [
            _Pending(self._communicator.Irecv([piece, self._mpi.BYTE], source, tag), (source,), piece.nbytes, True)
            for piece in _pieces(data, _PIECE_BYTES)
        ]

    def _run(self, start: Callable[[], list[_Pending]], phase: str, detail: str = "") -> None:
        self._finish(self._start(start, phase, detail), phase, detail)

    def _start(self, start: Callable[[], list[_Pending]], phase: str, detail: str) -> list[_Pending]:
        try:
            return start()
        except self._mpi.Exception as error:
            raise self._failed(error, phase, detail) from error

    def _finish(self, pending: list[_Pending], phase: str, detail: str = "", waits: Waits | None = None) -> None:
        """Poll until all requests are done. After any error the transport is unusable: requests are still under way.

        waits: where to note how long each rank's rows took to come.
        """
        began, pause = time.monotonic(), _PAUSES_S[0]
        spin_s = _SPIN_S + sum(each.num_bytes for each in pending) / _SPIN_BYTES_PER_S
        try:
            while True:
                left = [each for each in pending if not each.done(self._mpi)]
                waited = time.monotonic() - began
                if waits is not None and len(left) < len(pending):
                    for rank in _sources(pending) - _sources(left):
                        waits.add(rank, waited)
                if not (pending := left):
                    return
                if waited > self.deadline_s:
                    raise self._timed_out(pending, phase, detail)
                if waited < spin_s:
                    time.sleep(0)  # lets another rank run where ranks share a core
                else:
                    time.sleep(pause)
                    pause = min(1.5 * pause, _PAUSES_S[1])
        except self._mpi.Exception as error:
            raise self._failed(error, phase, detail) from error
        except _WrongSize as wrong:
            self._give_up(f"of a mismatch in phase {phase}")
            raise MoeRuntimeError(
                f"rank {self.rank}, phase {phase}, {detail}: {wrong}; all ranks must make the same calls in the same "
                "order, with counts that match"
            ) from None

    def _timed_out(self, pending: list[_Pending], phase: str, detail: str) -> PeerTimeout:
        self._give_up(f"phase {phase} timed out")
        ranks = tuple(sorted({rank for each in pending for rank in each.ranks}))
        return PeerTimeout(
            f"{self._where(phase, detail)}: waited {self.deadline_s:g} s for ranks {list(ranks)} over {self.name}; "
            "one of them is stuck, stopped or in a different call (raise timeout_s if it is only slow)",
            waiting_rank=self.rank,
            ranks=ranks,
            phase=phase,
        )

    def _failed(self, error: Any, phase: str, detail: str) -> MoeRuntimeError:
        self._give_up(f"phase {phase} failed")
        if error.Get_error_class() == self._mpi.ERR_TRUNCATE:
            return MoeRuntimeError(f"{self._where(phase, detail)}: a rank sends more than this rank expects ({error})")
        lost = self._failed_ranks()
        named = f"rank {lost[0]}" if lost else f"one of ranks {list(self._others())}"
        return PeerLost(
            f"{self._where(phase, detail)}: {named} is gone ({error}); look at its log",
            rank=lost[0] if lost else None,
            phase=phase,
        )

    def _give_up(self, why: str) -> None:
        self._unusable = why
        _failures.append(why)

    def _failed_ranks(self) -> list[int]:
        """The ranks MPI knows to be dead; none where it cannot tell (only MPI with fault tolerance, ULFM, can)."""
        mpi = self._mpi
        try:
            failed = self._communicator.Get_failed()
            ranks = failed.Translate_ranks(None, self._communicator.Get_group())
            return [rank for rank in ranks if rank != mpi.UNDEFINED]
        except (mpi.Exception, AttributeError, NotImplementedError):
            return []

    def _where(self, phase: str, detail: str) -> str:
        return f"rank {self.rank}, phase {phase}" + (f", {detail}" if detail else "")

    def _others(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.size) if rank != self.rank)

    def _check_usable(self, phase: str) -> None:
        if self._unusable is not None:
            raise RuntimeError(f"{phase}: the transport cannot be used any more: {self._unusable}")


class AlltoallV:
    """MPI's own Alltoallv over all ranks that mpirun started, for CPU tensors: a peer that benches measure beside ours.

    Unlike the transport's, its waits have no deadline: who calls it must be able to end this process. Every rank makes
    it. Raises VendorUnavailable when no MPI library can be loaded, or one that is not mpirun's own.
    """

    def __init__(self, size: int) -> None:
        self._mpi = _load_mpi()
        found = self._mpi.COMM_WORLD.Get_size()
        if found != size:
            raise VendorUnavailable(f"the MPI library sees {found} ranks of {size}: mpirun is another MPI's")
        self._communicator = self._mpi.COMM_WORLD.Dup()
        self._row_types: dict[int, Any] = {}

    def __call__(self, send: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> torch.Tensor:
        """Contiguous rows [N, ...], counts along dimension 0, to rows grouped by source rank."""
        recv = send.new_empty((sum(recv_counts), *send.shape[1:]))
        row_bytes = send.element_size() * math.prod(send.shape[1:])
        if row_bytes not in self._row_types:  # counted in rows, int32 is enough
            self._row_types[row_bytes] = self._mpi.BYTE.Create_contiguous(row_bytes).Commit()
        row = self._row_types[row_bytes]
        self._communicator.Alltoallv([byte_view(send), send_counts, row], [byte_view(recv), recv_counts, row])
        return recv


@dataclass(eq=False)
class _Pending:
    """A request under way: whom it waits for, and how many bytes it moves. It is kept alive until it is done."""

    request: Any
    ranks: tuple[int, ...]
    num_bytes: int = 0
    is_receive: bool = False

    def __post_init__(self) -> None:
        _under_way.add(self)

    def done(self, mpi: Any) -> bool:
        status = mpi.Status()
        if not self.request.Test(status):
            return False
        _under_way.discard(self)
        if self.is_receive and (count := status.Get_count(mpi.BYTE)) != self.num_bytes:
            raise _WrongSize(f"rank {self.ranks[0]} sent {count} bytes where this rank expects {self.num_bytes}")
        return True


class _WrongSize(Exception):
    pass


def _sources(pending: list[_Pending]) -> set[int]:
    return {each.ranks[0] for each in pending if each.is_receive}


def _pieces(values: np.ndarray, longest: int) -> list[np.ndarray]:
    return [values[first : first + longest] for first in range(0, max(len(values), 1), longest)]


def _load_mpi() -> Any:
    """mpi4py's MPI. The first call starts MPI, and sees to its end."""
    try:
        import mpi4py

        if "mpi4py.MPI" not in sys.modules:
            # mpi4py would call MPI_Finalize whatever happened, and wait for dead ranks.
            mpi4py.rc.finalize = False
            atexit.register(_finalize)
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise VendorUnavailable(
            f"mpi4py cannot load an MPI library ({error}); "
            "install moe-runtime[mpi] or put your MPI's libmpi on the library path"
        ) from error
    return MPI


def _finalize() -> None:
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized() or _failures:
        return
    if all(each.done(mpi) for each in tuple(_under_way)):  # what was started and never finished may have ended
        mpi.Finalize()


def agree_on_endpoint(rank: int, one_machine: bool) -> tuple[str, int, socket.socket | None]:
    """Rank 0 opens a listening socket and tells every rank of MPI.COMM_WORLD its address and port.

    On one machine the socket is on loopback; across machines on the address this host's name resolves to.
    Returns (address, port, rank 0's listening socket or None).
    """
    mpi = _load_mpi()
    message = np.zeros(256, dtype=np.uint8)
    listener = None
    if rank == 0:
        address = "127.0.0.1" if one_machine else socket.gethostbyname(socket.gethostname())
        if not one_machine and address.startswith("127."):
            raise ConfigError(
                f"this host's name resolves to {address}, which other nodes cannot reach; "
                "set MASTER_ADDR and MASTER_PORT for all ranks (mpirun -x MASTER_ADDR=... -x MASTER_PORT=...)"
            )
        listener = listen(address, 0)
        text = f"{address} {listener.getsockname()[1]}".encode()
        message[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    mpi.COMM_WORLD.Bcast(message, root=0)
    address, port = bytes(message).rstrip(b"\0").decode().split()
    return address, int(port), listener
