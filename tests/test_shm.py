"""The shared-memory transport: rows that are written once, windows that fill up, ranks that end at the worst moment.

Everything runs twice: with frames in shared memory (the C extension) and with frames over sockets (its slow twin). The
contract of all transports, on the first of the two, is in test_transports.py; here it runs on the second.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import test_transports
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_native import CSRC, TESTS, run
from test_transports import Outcome, outcome_of

from moe_runtime.comm import frames, rendezvous, window
from moe_runtime.comm.place import ON_CPU
from moe_runtime.comm.shm import SharedMemoryTransport
from moe_runtime.core import native
from moe_runtime.errors import ConfigError, MoeRuntimeError, PeerLost

TWINS = ["memory", "frames", "sockets"]  # parcels and frames in shared memory; frames only; frames over sockets
SMALL_WINDOW_BYTES = 256 << 10
DEADLINE_S = 20.0
FAULT_DEADLINE_S = 1.0
FAULTY = 1


needs_c = pytest.mark.skipif(native.extension is None, reason=f"parcels need the C extension: {native.describe()}")


@pytest.fixture(params=TWINS)
def twin(request) -> str:
    if request.param != "sockets" and native.extension is None:
        pytest.skip(native.describe())
    return request.param


# ---------------------------------------------------------------- ranks


def rank_main(body: Callable, folder: str, twin: str, deadline_s: float, window_bytes: int | None, *arguments):
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if twin == "sockets" or (twin == "mixed" and rank == FAULTY):
        native.extension = None
    if twin == "frames":
        window._LARGEST_PLACE = 0
    more = {} if window_bytes is None else {"window_bytes": window_bytes}
    transport = SharedMemoryTransport(dist.FileStore(f"{folder}/store", size), rank, size, deadline_s, **more)
    try:
        assert (transport.name == "shm") == (twin in ("memory", "frames"))
        assert transport.takes_counted_rows == (twin == "memory")
        return body(transport, *arguments)
    finally:
        transport.close()


def run_shm(body: Callable, size: int, twin: str, *arguments, deadline_s=DEADLINE_S, window_bytes=None, **options):
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(rank_main, size, body, folder, twin, deadline_s, window_bytes, *arguments, **options)


def plain_shm_rank(body: Callable, deadline_s: float, folder: str):
    return rank_main(body, folder, "sockets", deadline_s, test_transports.SMALL_WINDOW_BYTES)


class Pair:
    """Two ranks as two transports of this process, each used by a thread of its own."""

    def __init__(self, window_bytes: int = 1 << 20, deadline_s: float = 5.0) -> None:
        store = dist.HashStore()
        with ThreadPoolExecutor(2) as pool:
            self.ranks = list(
                pool.map(lambda rank: SharedMemoryTransport(store, rank, 2, deadline_s, window_bytes), range(2))
            )

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for transport in self.ranks:
            transport.close()

    def both(self, body: Callable) -> list:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(body, self.ranks))


@pytest.fixture
def plain_or_not(twin, monkeypatch) -> str:
    if twin == "sockets":
        monkeypatch.setattr(native, "extension", None)
    if twin == "frames":
        monkeypatch.setattr(window, "_LARGEST_PLACE", 0)
    return twin


# ---------------------------------------------------------------- exchanges of rows, and what must come of them


def row_of(source: int, to: int, number: int, row_bytes: int, step: int) -> torch.Tensor:
    start = source * 7 + to * 31 + number * 3 + step * 11
    return (torch.arange(start, start + row_bytes) % 251).to(torch.uint8)


def expected_rows(counts: np.ndarray, rank: int, row_bytes: int, step: int) -> torch.Tensor:
    rows = [
        row_of(source, rank, number, row_bytes, step)
        for source in range(len(counts))
        for number in range(counts[source, rank])
    ]
    return torch.stack(rows) if rows else torch.empty(0, row_bytes, dtype=torch.uint8)


def begin_rows(transport, counts: np.ndarray, row_bytes: int, step: int, seen: list | None = None) -> Callable:
    """start_rows of seeded rows, counts [source, destination]; the function checks what comes and returns it."""
    rank = transport.rank
    destination = [(to, number) for to in range(transport.size) for number in range(counts[rank, to])]
    filled = np.zeros(len(destination), dtype=int)

    def fill(begin: int, end: int, out: torch.Tensor) -> None:
        assert out.dtype == torch.uint8 and out.shape == (end - begin, row_bytes) and out.is_contiguous()
        assert end > begin and (transport.takes_counted_rows or destination[begin][0] == destination[end - 1][0])
        filled[begin:end] += 1
        for row, (to, number) in zip(out, destination[begin:end], strict=True):
            row.copy_(row_of(rank, to, number, row_bytes, step))
        if seen is not None:
            seen.append((destination[begin][0], begin, end, out.data_ptr()))

    sizes = [row_bytes] * transport.size
    finish = transport.start_rows(sizes, counts[rank].tolist(), counts[:, rank].tolist(), fill, "rows")

    def check() -> torch.Tensor:
        rows = finish().view(-1, row_bytes)
        assert (filled == 1).all()
        assert rows.dtype == torch.uint8 and torch.equal(rows, expected_rows(counts, rank, row_bytes, step)), step
        with pytest.raises(RuntimeError, match="rows"):
            finish()
        return rows

    return check


def all_pairs(size: int, count: int) -> np.ndarray:
    return np.full((size, size), count)


def is_inside(memory: np.ndarray, address: int, num_bytes: int = 1) -> bool:
    return memory.ctypes.data <= address <= memory.ctypes.data + memory.nbytes - num_bytes


def own_window(transport) -> np.ndarray:
    return np.frombuffer(transport._arena._window, dtype=np.uint8)


def in_own_window(transport, tensor: torch.Tensor) -> bool:
    return is_inside(own_window(transport), tensor.data_ptr(), tensor.numel())


def rows_lie_where_they_were_written(transport) -> None:
    size, rank, row_bytes = transport.size, transport.rank, 4096  # 100 rows are too many for a parcel
    theirs = {peer: lane._theirs for peer, lane in transport._lanes.items()} | {rank: own_window(transport)}
    for step, counts in enumerate((all_pairs(size, 100), all_pairs(size, 200), np.diag([100] * size))):
        seen: list = []
        rows = begin_rows(transport, counts, row_bytes, step, seen)()
        assert in_own_window(transport, rows) and rows.data_ptr() % 64 == 0
        assert rows.is_contiguous()
        assert sorted((begin, end) for _, begin, end, _ in seen) == [
            (sum(counts[rank, :to]), sum(counts[rank, : to + 1])) for to in range(size) if counts[rank, to]
        ]  # once per destination: the whole message in one piece
        for to, begin, end, address in seen:
            assert is_inside(theirs[to], address, (end - begin) * row_bytes), "not the receiver's window"
        addresses = transport.all_gather(
            torch.tensor([next((at - theirs[to].ctypes.data for to, _, _, at in seen if to == p), -1)
                          for p in range(size)]), "where"
        )  # fmt: skip
        offset = rows.data_ptr() - own_window(transport).ctypes.data
        for source in range(size):
            if counts[source, rank]:
                first = offset + row_bytes * sum(counts[:source, rank])
                assert addresses[source, rank] == first, "not written in place"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_are_written_once_where_the_receiver_reads_them(twin, size):
    run_shm(rows_lie_where_they_were_written, size, twin)


def random_exchanges(transport, steps: int) -> None:
    random = np.random.default_rng(transport.size)  # the same on every rank
    size, late = transport.size, None
    for step in range(steps):
        row_bytes = int(random.choice([16, 48, 1040]))
        counts = random.integers(0, 60, (size, size)) * random.integers(0, 2, (size, size))
        if step % 10 == 9:
            counts = np.zeros((size, size), dtype=int)
        check = begin_rows(transport, counts, row_bytes, step)
        if late is not None:
            late()
        late = check if step % 3 else None  # some of them overlap
        if late is None:
            check()
        if step % 7 == 0:
            transport.barrier("between")
            assert transport.all_gather(torch.tensor([transport.rank]), "between").view(-1).tolist() == [*range(size)]
    if late is not None:
        late()


@pytest.mark.parametrize("window_bytes", [None, SMALL_WINDOW_BYTES])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_random_counts_arrive_as_they_were_sent(twin, size, window_bytes):
    run_shm(random_exchanges, size, twin, 40, window_bytes=window_bytes)


def large_rows(transport) -> None:
    size = transport.size
    layout = transport._layout
    too_many = layout.window_bytes // 1024
    rows = begin_rows(transport, all_pairs(size, too_many), 1024, 1)()
    assert not in_own_window(transport, rows)  # in rounds, into memory of its own
    row_bytes = layout.chunk_bytes * 5 // 2 // 16 * 16
    rows = begin_rows(transport, all_pairs(size, 5), row_bytes, 2)()
    assert not in_own_window(transport, rows)  # a row at a time, and each in several chunks
    fits = (layout.window_bytes - layout.arena_at) // 64 // size
    assert in_own_window(transport, begin_rows(transport, all_pairs(size, fits), 64, 3)())  # all of it, to the end


@pytest.mark.parametrize("size", [2, 4])
def test_what_the_window_cannot_hold_goes_through_it_in_rounds(twin, size):
    run_shm(large_rows, size, twin, window_bytes=SMALL_WINDOW_BYTES)


def one_window_is_full(transport) -> None:
    """Of two messages of an exchange one has a place and the other has none."""
    held = begin_rows(transport, np.array([[0, 0], [9, 0]]), 16384, 0)()  # rank 0 keeps 144 KiB
    rows = begin_rows(transport, all_pairs(2, 4), 16384, 1)()
    assert in_own_window(transport, rows) == (transport.rank == 1)
    assert torch.equal(held, expected_rows(np.array([[0, 0], [9, 0]]), transport.rank, 16384, 0))


def test_each_rank_decides_for_its_own_window(twin):
    run_shm(one_window_is_full, 2, twin, window_bytes=SMALL_WINDOW_BYTES)


def rows_of_several_sizes(transport) -> None:
    """Rows between two ranks are as long as these two have agreed on."""
    random, size, rank = np.random.default_rng(3), transport.size, transport.rank
    sizes = [16 * (1 + (rank + other) % 3 * 40) for other in range(size)]
    for step in range(40):
        counts = random.choice([0, 1, 2, 5, 60], (size, size), p=[0.2, 0.3, 0.2, 0.2, 0.1])
        destination = [(to, number) for to in range(size) for number in range(counts[rank, to])]

        def fill(begin: int, end: int, out: torch.Tensor, destination=destination, step=step) -> None:
            for row, (to, number) in zip(out, destination[begin:end], strict=True):
                row.copy_(row_of(rank, to, number, sizes[to], step))

        mine, theirs = counts[rank].tolist(), counts[:, rank].tolist()
        if step % 2 and transport.takes_counted_rows:
            received, _, flat = transport.start_counted_rows(sizes, mine, (0, 0), fill, "rows")()
            assert received == theirs
        else:
            flat = transport.start_rows(sizes, mine, theirs, fill, "rows")()
        expected = [
            row_of(source, rank, number, sizes[source], step)
            for source in range(size)
            for number in range(counts[source, rank])
        ]
        assert torch.equal(flat, torch.cat([*expected, torch.empty(0, dtype=torch.uint8)]))


@pytest.mark.parametrize("size", [2, 3])
def test_rows_are_as_long_as_each_two_ranks_have_agreed_on(twin, size):
    run_shm(rows_of_several_sizes, size, twin, window_bytes=SMALL_WINDOW_BYTES)


# ---------------------------------------------------------------- how long results stay


def hold_many(transport) -> None:
    size, counts = transport.size, all_pairs(transport.size, 20)
    held = [begin_rows(transport, counts, 1040, step)() for step in range(30)]
    inside = [in_own_window(transport, rows) for rows in held]
    assert inside[0] and not inside[-1]  # until the window is full
    assert transport._arena.lent_bytes <= SMALL_WINDOW_BYTES
    for step, rows in enumerate(held):
        assert torch.equal(rows, expected_rows(counts, transport.rank, 1040, step)), step
    expected = held[0].clone()
    part, array, flat = held[0][3:5], held[1].numpy(), held[2].view(-1).view(torch.int32)
    values = flat.clone()
    del rows, held
    assert 0 < transport._arena.lent_bytes <= 3 * (20 * size * 1040 + 64)  # views keep their region
    for step in range(30, 60):
        begin_rows(transport, counts, 1040, step)()
    assert torch.equal(part, expected[3:5]) and torch.equal(flat, values)
    assert np.array_equal(array, expected_rows(counts, transport.rank, 1040, 1).numpy())
    del part, array, flat
    assert transport._arena.lent_bytes == 0


@pytest.mark.parametrize("size", [2, 3])
def test_results_stay_as_they_are_while_the_caller_has_them(twin, size):
    run_shm(hold_many, size, twin, window_bytes=SMALL_WINDOW_BYTES)


def thousands(transport, steps: int) -> None:
    """A few results are kept, each for a while, and the functions that finished them forever."""
    counts, kept, functions = all_pairs(transport.size, 9), {}, []  # 4 rows would fit in a parcel
    source = torch.zeros(9 * transport.size, 1024, dtype=torch.uint8)

    def fill(begin: int, end: int, out: torch.Tensor) -> None:
        out.copy_(source[begin:end])

    for step in range(steps):
        source.fill_(step % 251)
        finish = transport.start_rows([1024] * 2, counts[0].tolist(), counts[0].tolist(), fill, "rows")
        rows = finish()
        functions.append(finish)
        kept[step % 5] = (step, rows)
        assert in_own_window(transport, rows) and (rows == step % 251).all()
        if step % 50 == 0:
            assert all((old == number % 251).all() for number, old in kept.values())
    del rows
    kept.clear()
    assert transport._arena.lent_bytes == 0
    assert transport._arena.touched_bytes <= SMALL_WINDOW_BYTES


def test_released_memory_is_used_again(twin):
    run_shm(thousands, 2, twin, 3000 if twin == "memory" else 1000, window_bytes=SMALL_WINDOW_BYTES)


def results_in_other_threads(transport) -> None:
    """Results end in any thread, such as autograd's, while this one exchanges."""
    counts, queue, stop = all_pairs(transport.size, 8), [], threading.Event()

    def drop() -> None:
        while not stop.is_set() or queue:
            if queue:
                queue.pop()

    dropper = threading.Thread(target=drop)
    dropper.start()
    try:
        for step in range(200):
            queue.append(begin_rows(transport, counts, 1040, step)())
    finally:
        stop.set()
        dropper.join()
    assert transport._arena.lent_bytes == 0


def test_results_may_end_in_another_thread(twin):
    run_shm(results_in_other_threads, 2, twin, window_bytes=SMALL_WINDOW_BYTES)


def outlive_the_transport(transport) -> None:
    counts = all_pairs(transport.size, 8)
    rows = begin_rows(transport, counts, 1040, 3)()
    transport.barrier("done")
    transport.close()
    assert torch.equal(rows, expected_rows(counts, transport.rank, 1040, 3))
    rows += 1  # still this rank's memory, to write to as well


def test_results_outlive_the_transport(twin):
    run_shm(outlive_the_transport, 2, twin)


def large_tensors(transport) -> None:
    """all_to_all_v of what is large enough comes back in the window, too, whatever its dtype."""
    size, rank = transport.size, transport.rank
    for dtype in (torch.bfloat16, torch.float32, torch.uint8, torch.float64):
        for hidden, inside in ((3, False), (70_001, True)):
            rows = torch.stack([torch.full((hidden,), 10 * rank + to).to(dtype) for to in range(size)])
            got = transport.all_to_all_v(rows, [1] * size, [1] * size, "tensors")
            assert got.dtype == dtype and in_own_window(transport, got) == inside
            assert got[:, 0].tolist() == [10 * source + rank for source in range(size)] and (got == got[:, :1]).all()


def test_large_tensors_are_written_once_as_well(twin):
    run_shm(large_tensors, 3, twin)


def test_regions_are_lent_first_fit_and_pages_are_taken_when_needed():
    layout = window.layout_of(2, 8 << 20)
    arena = window.Arena(mmap.mmap(-1, layout.window_bytes), layout)
    assert arena.touched_bytes == 0 and layout.is_region(layout.arena_at, 1)
    first, second, third = (arena.lend(size) for size in (1, 100, 64))
    assert [at - layout.arena_at for at, _ in (first, second, third)] == [0, 64, 192]
    del second
    assert arena.lend(129)[0] - layout.arena_at == 256  # two lines are free, three are needed
    fourth = arena.lend(128)
    assert fourth[0] - layout.arena_at == 64 and arena.lent_bytes == 256
    assert 0 < arena.touched_bytes <= 2 << 20
    assert arena.lend(layout.window_bytes) is None
    rest = arena.lend(layout.window_bytes - layout.arena_at - 256)
    assert rest is not None and arena.lend(1) is None
    assert not layout.is_region(layout.window_bytes - 63, 64) and not layout.is_region(layout.arena_at - 1, 1)
    assert not layout.is_region(-1, 1) and not layout.is_region(1 << 62, 1 << 62)


def test_a_window_that_is_too_small_says_how_large_it_must_be():
    with pytest.raises(ConfigError, match="too small for 4 ranks: at least"):
        window.layout_of(4, 30_000)


# ---------------------------------------------------------------- ranks that end, stay away or disagree


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def rows_outcome(transport, count: int = 3, row_bytes: int = 1040, fill: Callable | None = None) -> Outcome:
    size = transport.size

    def zeros(begin: int, end: int, out: torch.Tensor) -> None:
        out.zero_()

    def exchange() -> None:
        rows = transport.start_rows([row_bytes] * size, [count] * size, [count] * size, fill or zeros, "dispatch")()
        assert not rows.any()

    outcome = outcome_of(exchange)
    time.sleep(0.5)  # others must not take this rank's end for the fault
    return outcome


def die_while_filling(transport, count: int, calls: int) -> Outcome | None:
    transport.barrier("before")

    def fill(begin: int, end: int, out: torch.Tensor) -> None:
        nonlocal calls
        out[: len(out) // 2] = 0
        if calls == 0:
            die()
        calls -= 1
        out.zero_()

    return rows_outcome(transport, count, fill=fill if transport.rank == FAULTY else None)


def die_before_naming_a_place(transport) -> Outcome | None:
    transport.barrier("before")
    if transport.rank == FAULTY:
        time.sleep(0.3)
        die()
    return rows_outcome(transport)


@pytest.mark.parametrize(
    "body, arguments",
    [
        pytest.param(die_before_naming_a_place, (), id="before it names a place"),
        pytest.param(die_while_filling, (5, 0), id="filling its own rows"),
        pytest.param(die_while_filling, (5, 1), id="filling a peer's rows"),
        pytest.param(die_while_filling, (2000, 0), id="in rounds"),
        pytest.param(die_while_filling, (2000, 40), id="in a later round"),
    ],
)
def test_a_rank_that_dies_during_an_exchange_is_named(twin, body, arguments):
    outcomes = run_shm(
        body, 3, twin, *arguments,
        deadline_s=5.0, window_bytes=SMALL_WINDOW_BYTES, expect_dead=(FAULTY,), timeout=30,
    )  # fmt: skip
    for rank in (0, 2):
        outcome = outcomes[rank]
        assert outcome.kind == "PeerLost" and outcome.ranks == (FAULTY,), outcome
        assert f"rank {rank}, phase dispatch" in outcome.message and "rank 1 (process" in outcome.message, outcome
        assert outcome.seconds < 1.5, outcome  # most of it is filling in rounds; noticing takes 20 ms


def test_a_rank_that_dies_when_it_has_written_is_no_loss(twin):
    """Rows of a rank that has ended since still count: both that it named a place for and that it wrote."""

    outcomes = run_shm(die_after_both, 3, twin, expect_dead=(FAULTY,), timeout=30)
    assert [outcomes[rank].kind for rank in (0, 2)] == ["nothing", "nothing"], outcomes


def die_after_both(transport) -> Outcome | None:
    """All start; the faulty rank finishes and dies before the others finish."""
    transport.barrier("before")
    finish = transport.start_rows([1040] * 3, [3] * 3, [3] * 3, lambda begin, end, out: out.zero_(), "dispatch")
    time.sleep(0.2)
    if not transport.takes_counted_rows:
        transport._work(transport._latest, 0.0)  # all have named their places by now: write what is left
    if transport.rank == FAULTY:
        finish()
        die()
    time.sleep(0.5)
    return outcome_of(finish)


def withhold(transport) -> Outcome | None:
    transport.barrier("before")
    if transport.rank == FAULTY:
        time.sleep(FAULT_DEADLINE_S + 1.0)
        return None
    return rows_outcome(transport)


def test_a_rank_that_does_not_come_is_named_with_the_counts(twin):
    outcomes = run_shm(withhold, 3, twin, deadline_s=FAULT_DEADLINE_S, timeout=30)
    for rank in (0, 2):
        outcome = outcomes[rank]
        assert outcome.kind == "PeerTimeout" and outcome.ranks == (FAULTY,), outcome
        for part in (
            f"rank {rank}, phase dispatch",
            "sending [3, 3, 3] and expecting [3, 3, 3]",
            "waited 1 s for ranks [1]",
            "nothing received"
            if twin == "memory"
            else "0 of 3120 bytes sent, no place named for them yet, 0 of 3120 received",
        ):
            assert part in outcome.message, outcome
        assert FAULT_DEADLINE_S - 0.1 < outcome.seconds < FAULT_DEADLINE_S + 1, outcome


@pytest.mark.parametrize("sent, expected", [(3, 2), (0, 2), (2, 0), (0, 5000), (5000, 0)])
def test_counts_that_do_not_match_are_named(twin, sent, expected):
    outcomes = run_shm(disagree_at_once, 2, twin, sent, expected, window_bytes=SMALL_WINDOW_BYTES, timeout=30)
    assert "MoeRuntimeError" in [outcome.kind for outcome in outcomes], outcomes
    for outcome in outcomes:
        assert outcome.kind in ("MoeRuntimeError", "PeerLost") and "phase dispatch" in outcome.message, outcome
        if outcome.kind == "MoeRuntimeError":
            assert f"{16 * sent}" in outcome.message and f"{16 * expected}" in outcome.message, outcome


def disagree_at_once(transport, sent: int, expected: int) -> Outcome:
    """Rank 1 sends rank 0 another number of rows than that expects."""
    transport.barrier("before")
    send, recv = [2, 2], [2, 2]
    if transport.rank == FAULTY:
        send[0] = sent
    else:
        recv[FAULTY] = expected
    outcome = outcome_of(
        lambda: transport.start_rows([16, 16], send, recv, lambda begin, end, out: out.zero_(), "dispatch")()
    )
    time.sleep(0.5)
    return outcome


def test_an_end_is_noticed_soon(plain_or_not):
    with Pair(deadline_s=5.0) as pair:

        def body(transport) -> Outcome | None:
            if transport.rank == FAULTY:
                time.sleep(0.3)
                transport.close()
                return None
            return outcome_of(lambda: transport.barrier("waiting"))

        outcome = pair.both(body)[0]
        assert outcome.kind == "PeerLost" and outcome.ranks == (FAULTY,)
        assert 0.2 < outcome.seconds < 0.5, outcome  # 20 ms on a machine that does nothing else


def test_ranks_with_windows_of_different_sizes_do_not_meet():
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        meeting = [pool.submit(SharedMemoryTransport, store, rank, 2, 5.0, (rank + 1) << 20) for rank in range(2)]
        for rank, future in enumerate(meeting):
            error = future.exception()
            assert isinstance(error, ConfigError), error
            assert f"rank {1 - rank} has windows of {(2 - rank) << 20} bytes, rank {rank} of {(rank + 1) << 20}" in str(
                error
            )


class Mistake(Exception):
    pass


def fill_fails(transport) -> Outcome:
    transport.barrier("before")

    def fill(begin: int, end: int, out: torch.Tensor) -> None:
        raise Mistake("in the caller's function")

    if transport.rank == FAULTY:
        with pytest.raises(Mistake):
            rows_outcome(transport, fill=fill)
        with pytest.raises(RuntimeError, match="after: .*Mistake ended phase dispatch before its time"):
            transport.barrier("after")
        transport.close()
        time.sleep(0.5)
        return Outcome("PeerLost", "", 0.0, ranks=(FAULTY,))
    return rows_outcome(transport)


def test_an_error_in_the_callers_function_is_the_callers(twin):
    for outcome in run_shm(fill_fails, 3, twin, timeout=30):
        assert outcome.kind == "PeerLost" and outcome.ranks == (FAULTY,) and outcome.seconds < 1, outcome


def all_die(transport) -> None:
    with contextlib.suppress(PeerLost):  # a slow rank may begin after the others are gone; it dies all the same
        begin_rows(transport, all_pairs(transport.size, 50), 1040, 0)
    die()


def test_ranks_that_are_all_killed_leave_nothing_behind(twin):
    before = sorted(os.listdir("/dev/shm"))
    assert run_shm(all_die, 3, twin, expect_dead=(0, 1, 2), timeout=30) == [None] * 3
    assert [name for name in sorted(os.listdir("/dev/shm")) if name not in before and "moe" in name] == []


def test_wrong_arguments_are_errors_of_the_caller():
    transport = SharedMemoryTransport(dist.HashStore(), 0, 1, 1.0)

    def start(row_bytes: int, send: list[int], recv: list[int]) -> None:
        transport.start_rows([row_bytes], send, recv, lambda begin, end, out: None, "wrong")

    for row_bytes in (0, -16, 24):
        with pytest.raises(ConfigError, match="wrong: row_bytes must be 1 positive multiples of 16"):
            start(row_bytes, [1], [1])
    for send, recv in (([1, 1], [1]), ([1], [-1]), ([-1], [1])):
        with pytest.raises(ConfigError, match="counts must be 1 numbers"):
            start(16, send, recv)
    with pytest.raises(ConfigError, match="does not agree with itself"):
        start(16, [2], [1])
    transport.barrier("and the transport can still be used")
    transport.close()


# ---------------------------------------------------------------- what a peer wrote is checked


def say(transport, kind: int, number: int, a: int = 0, b: int = 0, c: int = 0) -> None:
    """Let rank 1 send rank 0 a frame."""
    transport._lanes[0]._frames.send(frames.FRAME.pack(kind, number, a, b, c))


IMPOSSIBLE = {
    "a kind that is not known": (77, 1),
    "a chunk longer than a chunk": (frames.DATA, 1, 1 << 30, 160),
    "a chunk longer than what is left": (frames.DATA, 1, 161, 160),
    "a chunk of negative length": (frames.DATA, 1, -8, 160),
    "a free chunk too many": (frames.FREE, 0),
    "a message from the past": (frames.WRITTEN, 0, 160),
    "a message from the far future": (frames.OPEN, 99, 160, 160),
    "a place before the arena": (frames.OPEN, 1, 160, 160, 64),
    "a place behind the window": (frames.OPEN, 1, 160, 160, (1 << 20) - 100),
    "a negative place": (frames.OPEN, 1, 160, 160, -2),
    "a place that overflows": (frames.OPEN, 1, 160, 160, (1 << 63) - 100),
    "rows of another size": (frames.WRITTEN, 1, 1 << 40),
}


def test_auto_leaves_shared_memory_alone_where_the_system_has_none(monkeypatch):
    assert rendezvous.can_share_memory(ON_CPU)
    monkeypatch.setattr(os, "memfd_create", lambda name: (_ for _ in ()).throw(PermissionError("not here")))
    assert not rendezvous.can_share_memory(ON_CPU)
    monkeypatch.delattr(os, "memfd_create")
    assert not rendezvous.can_share_memory(ON_CPU)


@pytest.mark.parametrize("twin", ["frames", "sockets"], indirect=True)
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_frame_that_cannot_be_is_an_error_that_names_the_rank(plain_or_not, case):
    with Pair() as pair:
        if case == "a chunk longer than what is left":
            pair.ranks[0]._arena.lend = lambda num_bytes: None  # let it expect chunks
        say(pair.ranks[1], *IMPOSSIBLE[case])
        with pytest.raises(MoeRuntimeError, match="phase dispatch.*rank 1") as caught:
            pair.ranks[0].start_rows([16, 16], [10, 10], [10, 10], lambda begin, end, out: out.zero_(), "dispatch")()
        assert "cannot be" in str(caught.value) or "where this rank expects" in str(caught.value)
        with pytest.raises(RuntimeError, match="cannot be used any more"):
            pair.ranks[0].barrier("after")


IMPOSSIBLE_PARCELS = {  # bytes, and the note: rows, whether they are here, rows expected, two of the caller's
    "fewer bytes than rows": (16, [10, 1, 10, 0, 0]),
    "a negative number of rows": (160, [-10, 1, 10, 0, 0]),
    "rows too many to count": (160, [1 << 62, 1, 10, 0, 0]),
    "few rows that are elsewhere": (0, [10, 0, 10, 0, 0]),
    "neither here nor elsewhere": (160, [10, 7, 10, 0, 0]),
    "another number of rows": (176, [11, 1, 10, 0, 0]),
    "another number expected": (160, [10, 1, 11, 0, 0]),
}


@needs_c
@pytest.mark.parametrize("case", IMPOSSIBLE_PARCELS)
def test_a_parcel_that_cannot_be_is_an_error_that_names_the_rank(case):
    num_bytes, note = IMPOSSIBLE_PARCELS[case]
    with Pair() as pair:
        pair.ranks[1]._parcels.post(np.zeros(num_bytes, np.uint8), [0, num_bytes, num_bytes], [note, note])
        with pytest.raises(MoeRuntimeError, match="phase dispatch.*rank 1") as caught:
            pair.ranks[0].start_rows([16, 16], [10, 10], [10, 10], lambda begin, end, out: out.zero_(), "dispatch")()
        assert ("where this rank expects" if "another" in case else "cannot be") in str(caught.value)
        with pytest.raises(RuntimeError, match="cannot be used any more"):
            pair.ranks[0].barrier("after")


@needs_c
@pytest.mark.parametrize("number, length", [(2, 16), (3, 16), (1 << 63, 16), (1, 1 << 40)])
def test_a_place_for_parcels_that_no_rank_can_have_left_is_an_error(number, length):
    with Pair() as pair:
        receiver = pair.ranks[0]
        place = receiver._layout.parcels_at + window.PLACES * receiver._layout.place_bytes  # rank 1's first
        head = np.frombuffer(receiver._arena._window, np.uint64, 3, place)
        head[2], head[0] = length, number
        with pytest.raises(MoeRuntimeError, match="phase dispatch.*cannot be: .*no writer leaves there"):
            receiver.start_rows([16, 16], [1, 1], [1, 1], lambda begin, end, out: out.zero_(), "dispatch")()


@needs_c
def test_a_rank_that_does_not_take_its_parcels_is_found_out():
    with Pair() as pair:
        message, notes = np.zeros(16, np.uint8), [[0] * 5] * 2
        for _ in range(window.PLACES):
            pair.ranks[1]._parcels.post(message, [0, 16, 16], notes)
        with pytest.raises(frames.Broken, match="rank 0 are not taken in turn"):
            pair.ranks[1]._parcels.post(message, [0, 16, 16], notes)


@needs_c
def test_wrong_arguments_for_parcels_are_value_errors():
    memory = mmap.mmap(-1, 1 << 16)
    numbers, notes, bounds = np.array([1, 1]), np.zeros((2, 5), np.int64), np.array([0, 16, 32])
    message, lengths, waited = np.zeros(32, np.uint8), np.array([-1, -1]), np.zeros(2, np.int64)
    post = dict(windows=(memory, memory), rank=0, at=4096, place_bytes=4096, numbers=numbers, notes=notes,
                message=message, bounds=bounds)  # fmt: skip
    gather = dict(window=memory, at=4096, place_bytes=4096, numbers=numbers, lengths=lengths, notes=notes,
                  waited_ns=waited, spin_ns=0, timeout_ns=0)  # fmt: skip
    fetch = dict(window=memory, at=4096, place_bytes=4096, numbers=numbers,
                 lengths=np.array([16, 8]), shares=np.array([16, 16]), message=message)  # fmt: skip
    read_only = np.frombuffer(bytes(16), np.int64)
    wrong = {
        "parcels_post": (post, dict(windows=[memory, memory]), dict(windows=(memory,)), dict(windows=(b"", memory)),
                         dict(rank=2), dict(rank=-1), dict(rank="a"), dict(at=0), dict(at=4100), dict(at=1 << 62),
                         dict(place_bytes=0), dict(place_bytes=1 << 62), dict(place_bytes=4097),
                         dict(numbers=numbers[:1]),
                         dict(numbers=numbers.astype(np.int32)), dict(notes=notes[:1]), dict(notes=notes[:, :4].copy()),
                         dict(bounds=bounds[:2]), dict(bounds=bounds[::-1].copy()), dict(bounds=np.array([0, 16, 33])),
                         dict(bounds=np.array([-1, 16, 32])), dict(message=None), dict(place_bytes=64)),
        "parcels_gather": (gather, dict(window=bytes(1 << 16)), dict(at=1 << 16), dict(place_bytes=1 << 16),
                           dict(lengths=lengths[:1]), dict(lengths=read_only), dict(notes=notes[:, :4].copy()),
                           dict(waited_ns=waited[:1]), dict(waited_ns=lengths), dict(window=None)),
        "parcels_fetch": (fetch, dict(shares=bounds), dict(lengths=bounds), dict(shares=np.array([16, 17])),
                          dict(shares=np.array([-16, 16])), dict(shares=np.array([1 << 62, 1 << 62])),
                          dict(lengths=np.array([17, 0])), dict(lengths=np.array([-1, 0])), dict(message=bytes(32)),
                          dict(at=1 << 40), dict(numbers=numbers + 9)),
    }  # fmt: skip
    for name, (right, *changes) in wrong.items():
        function = getattr(native.extension, name)
        for change in changes:
            with pytest.raises(ValueError):
                function(*(right | change).values())
    post["windows"] = (mmap.mmap(-1, 1 << 16), memory)
    assert native.extension.parcels_post(*post.values()) is None
    assert native.extension.parcels_gather(*(gather | dict(timeout_ns=10**7)).values()) == -1  # rank 1 sent nothing
    assert lengths.tolist() == [16, -1] and waited[1] >= 10**7


def counted_exchanges(transport, steps: int) -> None:
    """Rows whose receivers do not know their number, some of them too many for a parcel; other calls between."""
    random = np.random.default_rng(7)
    size, rank, most = transport.size, transport.rank, transport._layout.place_bytes // 16
    for step in range(steps):
        choices = [0, 1, most - 5, most - 4, most - 3, 3 * most]
        counts = random.choice(choices, (size, size), p=[0.3, 0.4, 0.1, 0.1, 0.05, 0.05])
        mine = counts[rank].tolist()
        starts = np.cumsum([0, *mine])

        def fill(begin: int, end: int, out: torch.Tensor, starts=starts, step=step) -> None:
            to = np.searchsorted(starts, np.arange(begin, end), side="right") - 1
            told = (np.arange(begin, end) - starts[to]) * 8 + to  # the row's number, and whom it is for
            out.view(torch.int64)[:] = torch.from_numpy(np.stack([told + (step << 40), told * 0 + rank], 1))

        finish = transport.start_counted_rows([16] * size, mine, (step, 10 * rank), fill, "dispatch")
        if step % 3 == 1:
            transport.barrier("between")
        if step % 5 == 2:
            assert transport.all_gather(torch.tensor([rank]), "between").view(-1).tolist() == [*range(size)]
        received, notes, rows = finish()
        assert received == counts[:, rank].tolist()
        assert notes == [[step, 10 * source] for source in range(size)]
        expected = [
            np.stack([np.arange(count) * 8 + rank + (step << 40), np.full(count, source)], 1)
            for source, count in enumerate(received)
        ]
        assert np.array_equal(rows.view(-1, 16).view(torch.int64).numpy(), np.concatenate(expected))


@needs_c
@pytest.mark.parametrize("size", [2, 3, 4])
def test_rows_whose_number_the_receiver_does_not_know(size):
    run_shm(counted_exchanges, size, "memory", 150, window_bytes=SMALL_WINDOW_BYTES)


@pytest.mark.parametrize("frame", [b"\x01", b"\x04" + bytes(20), bytes(frames.FRAME.size + 8)])
def test_a_frame_of_a_wrong_length_is_refused(plain_or_not, frame):
    with Pair() as pair:
        pair.ranks[1]._lanes[0]._frames.send(frame)
        with pytest.raises(MoeRuntimeError, match="rank 1 .*a frame of"):
            pair.ranks[0].barrier("dispatch")


@pytest.mark.parametrize("value", [0xFF, 0x7F, 2])
@pytest.mark.parametrize("part", ["number", "length", "taken"])
def test_a_ring_that_was_overwritten_is_an_error(part, value):
    if native.extension is None:
        pytest.skip(native.describe())
    with Pair() as pair:
        memory = own_window(pair.ranks[0] if part != "taken" else pair.ranks[1])
        ring = 64 + (1 if part != "taken" else 0) * window.control_bytes(1) - (64 if part != "taken" else 0)
        slot = ring + 64
        if part == "number":
            memory[slot : slot + 8] = value
        elif part == "length":
            memory[slot], memory[slot + 8 : slot + 12] = 1, value
        else:
            memory[ring : ring + 8] = value
        with pytest.raises(MoeRuntimeError, match="phase dispatch: what rank 1 .* the ring is"):
            pair.ranks[0].barrier("dispatch")


def test_the_binding_refuses_what_is_no_window():
    extension = native.extension
    if extension is None:
        pytest.skip(native.describe())
    assert [extension.exchange_control_bytes(size) for size in (0, 1, 5)] == [*map(window.control_bytes, (0, 1, 5))]
    memory = bytearray(2 * window.control_bytes(2))
    at = -np.frombuffer(memory, dtype=np.uint8).ctypes.data % 64
    good = memoryview(memory)[at : at + window.control_bytes(2)]
    extension.exchange_send(good, 1, 1, b"x" * window.FRAME_BYTES)
    assert extension.exchange_look(good) == 1
    assert extension.exchange_receive(good, 1, 1) == b"x" * window.FRAME_BYTES
    assert extension.exchange_receive(good, 1, 2) is None and extension.exchange_receive(good, 0, 1) is None
    assert extension.exchange_await(good, 0, 0, 10**9) == 1
    assert extension.exchange_await(good, 1, 1000, 10**6) == 0
    for call in (
        lambda: extension.exchange_send(good, 2, 1, b""),
        lambda: extension.exchange_send(good, 1, 2, b"x" * (window.FRAME_BYTES + 1)),
        lambda: extension.exchange_send(good, 1, 0, b""),
        lambda: extension.exchange_send(bytes(good), 1, 2, b""),
        lambda: extension.exchange_send(memoryview(memory)[at + 1 :], 0, 1, b""),
        lambda: extension.exchange_send(good[8:], 0, 1, b""),
        lambda: extension.exchange_receive(good, 2, 1),
        lambda: extension.exchange_receive(good[:64], 0, 1),
        lambda: extension.exchange_look(good[:8]),
        lambda: extension.exchange_await(good[8:], 0, 0, 0),
        lambda: extension.exchange_control_bytes(1 << 40),
    ):
        with pytest.raises(ValueError):
            call()
    for call in (
        lambda: extension.exchange_send(good, 1, 2),
        lambda: extension.exchange_send(good, 1, 2, "text"),
        lambda: extension.exchange_receive(good, "1", 2),
        lambda: extension.exchange_look(),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(OverflowError):
        extension.exchange_receive(good, -1, 2)


# ---------------------------------------------------------------- waiting


def moves_meanwhile(transport) -> None:
    """The rank that starts last holds up nobody by computing before it finishes."""
    transport.barrier("before")
    late = transport.size - 1
    if transport.rank == late:
        time.sleep(0.3)
    check = begin_rows(transport, all_pairs(transport.size, 100), 1040, 0)
    if transport.rank == late:
        time.sleep(0.8)
    began = time.monotonic()
    check()
    # The others wait until the last one starts, and while it writes their rows.
    assert time.monotonic() - began < 0.7, time.monotonic() - began


def test_a_rank_that_starts_last_and_computes_holds_up_nobody(twin):
    run_shm(moves_meanwhile, 2, twin)


def wait_asleep(transport) -> float:
    """Seconds of processor time that a rank takes to wait for half a second."""
    transport.barrier("before")
    began = time.process_time()
    if transport.rank == 0:
        time.sleep(0.5)
    transport.barrier("late")
    return time.process_time() - began


def test_a_rank_that_waits_leaves_the_processor_to_others(twin):
    assert max(run_shm(wait_asleep, 4, twin)) < 0.1


def latency(transport) -> float:
    """Microseconds of one exchange of counts, the best of several series."""
    size, ones = transport.size, [1] * transport.size
    header, best = torch.zeros(size, 3, dtype=torch.int64), float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(100):
            transport.all_to_all_v(header, ones, ones, "counts")
        best = min(best, (time.perf_counter() - began) / 100)
    return 1e6 * best


@pytest.mark.parametrize("size", [2, 4])
def test_the_time_of_an_exchange_of_counts(twin, size, capsys):
    times = run_shm(latency, size, twin)
    with capsys.disabled():
        print(f"\nan exchange of counts, {size} ranks, frames in {twin}: {max(times):.1f} us")
    assert max(times) < 20_000


# ---------------------------------------------------------------- the twin, and the C that it is the twin of


def test_ranks_that_have_no_extension_make_all_use_sockets():
    names = run_shm(name_of, 3, "mixed")
    if native.extension is None:
        pytest.skip(native.describe())
    assert set(names) == {"shm (frames over sockets: no C extension on ranks [1])"}


def name_of(transport) -> str:
    begin_rows(transport, all_pairs(transport.size, 5), 64, 0)()
    assert transport.name[5:-1] in transport.describe()[0]
    return transport.name


def test_what_runs_is_visible(plain_or_not):
    with Pair() as pair:
        said = pair.ranks[0].describe()[0]
        assert ("in shared memory (C)" in said) == (plain_or_not != "sockets")
        assert "1.0 MiB per rank" in said and "0.0 MiB held" in said


@functools.cache
def plain_contract(size: int) -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(plain_shm_rank, size, test_transports.contract, test_transports.DEADLINE_S, folder)


@pytest.mark.parametrize("size", test_transports.SIZES)
def test_the_contract_holds_without_the_extension(size):
    assert plain_contract(size) == test_transports.run_contract("threads", size)


@pytest.mark.parametrize(
    "test, arguments",
    [
        (test_transports.test_a_lost_rank_ends_the_others_calls_within_the_deadline, ("shm", "lose")),
        (test_transports.test_a_lost_rank_ends_the_others_calls_within_the_deadline, ("shm", "lose under way")),
        (test_transports.test_a_rank_that_withholds_its_call_is_named_at_the_deadline, ("shm",)),
        (test_transports.test_a_rank_that_does_not_come_to_an_exchange_under_way_is_named, ("shm",)),
        (test_transports.test_closing_does_not_wait_for_an_exchange_under_way, ("shm",)),
        (test_transports.test_counts_that_do_not_match_are_an_error_where_the_rows_arrive, ("shm",)),
        (test_transports.test_a_rank_that_closes_its_transport_is_lost_to_the_others, ("shm",)),
        (test_transports.test_a_rank_that_leaves_because_of_another_says_so, ("shm",)),
        (test_transports.test_shared_memory_has_no_name_in_the_file_system, ()),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value.__name__.removeprefix("test_"),
)
def test_faults_end_as_well_without_the_extension(monkeypatch, test, arguments):
    monkeypatch.setattr(test_transports, "shm_rank", plain_shm_rank)
    test(*arguments)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_frames_under_sanitizers(sanitizer, tmp_path):
    """Threads and processes write and read at once; see tests/native/test_exchange.c."""
    compiler = compiler_with(sanitizer, tmp_path)
    program = tmp_path / "test_exchange"
    sources = [TESTS / "native" / "test_exchange.c", CSRC / "exchange.c"]
    built = run(*compiler, "-Wall", "-Wextra", "-I", CSRC, *sources, "-o", program)
    assert built.returncode == 0, built.stderr
    assert "warning:" not in built.stderr, built.stderr
    result = run(program)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert result.stdout.strip().endswith("passed"), result.stdout


def compiler_with(sanitizer: str, folder: Path) -> list[str]:
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        pytest.skip("no C compiler (cc, gcc or clang) is on PATH")
    flags = ["-std=c11", "-g", "-O1", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    (folder / "probe.c").write_text("int main(void) { return 0; }\n")
    built = run(found, *flags, folder / "probe.c", "-o", folder / "probe")
    if built.returncode != 0 or run(folder / "probe").returncode != 0:
        pytest.skip(f"{found} cannot build programs with -fsanitize={sanitizer} that start here")
    return [found, *flags]
