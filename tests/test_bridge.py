"""The ZeroMQ bridge: a world without torch.distributed; ranks that disagree, leave or stay silent are named."""

from __future__ import annotations

import contextlib
import os
import time

import pytest
import torch
from families import write_checkpoint
from ranks import run_ranks
from test_families import SPLITS, check_rank, write_oracle

import moe_runtime
from moe_runtime.errors import ConfigError, PeerLost, PeerTimeout

ZEROMQ = {"transport": "zeromq", "timeout_s": 20}


@pytest.mark.parametrize("transport", ["zeromq", "shm"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_model_over_another_transport_equals_one_process(tmp_path, size, transport):
    write_oracle(tmp_path, "deepseek_v3")
    run_ranks(check_rank, size, tmp_path, SPLITS[size], {"transport": transport})


def exchanges() -> str:
    name = check_exchanges(ZEROMQ)
    assert not torch.distributed.is_initialized()
    return name


def check_exchanges(settings: dict) -> str:
    """Every call of the contract, with values that say where they come from; returns the transport's name."""
    with moe_runtime.init(settings) as runtime:
        transport, rank, size, device = runtime.transport, runtime.rank, runtime.size, runtime.device
        counts = [(rank + peer) % 3 for peer in range(size)]  # symmetric: what I send to p is what p sends to me
        rows = torch.full((sum(counts), 5), float(rank), dtype=torch.bfloat16, device=device)
        got = transport.all_to_all_v(rows, counts, counts, "test")
        assert got[:, 0].tolist() == [float(peer) for peer in range(size) for _ in range(counts[peer])]
        large = torch.arange(3_000_000, dtype=torch.float32, device=device) + rank  # 12 MB: many chunks
        everyone = transport.all_gather(large, "test")
        assert all(torch.equal(everyone[peer], large - rank + peer) for peer in range(size))
        for kind in (torch.float32, torch.bfloat16, torch.int64):
            total = torch.tensor(rank, dtype=kind, device=device)
            transport.all_reduce(total, "test")
            assert total == sum(range(size)), kind
        word = torch.tensor([7 if rank == 1 else 0], device=device)
        transport.broadcast(word, 1, "test")
        assert word == 7
        if rank == 0:
            transport.send(large, 1, "test")
        elif rank == 1:
            transport.recv(large, 0, "test")
            assert large[0] == 0
        for _ in range(200):
            transport.barrier("test")
        return transport.name


def test_exchanges():
    assert run_ranks(exchanges, 3) == ["bridge:zeromq"] * 3


def rank_dies(how: str) -> str:
    return rank_goes_missing(how, {"transport": "zeromq", "timeout_s": 4})


def rank_goes_missing(how: str, settings: dict) -> str:
    """Rank 1 dies, closes or sleeps; the others must find out in time and say so. Returns the error's name."""
    with moe_runtime.init(settings) as runtime:
        runtime.transport.barrier("test")
        if runtime.rank == 1:
            if how == "dies":
                time.sleep(0.5)  # the barrier's message must have left: an exit takes what is still queued with it
                os._exit(0)
            if how == "closes":
                return "closed"
            time.sleep(8)
            return "slept"
        start = time.monotonic()
        with pytest.raises((PeerLost, PeerTimeout)) as caught:
            runtime.transport.all_gather(torch.zeros(2), "the test's exchange")
        assert time.monotonic() - start < 7
        assert "the test's exchange" in str(caught.value) and "rank 1" in str(caught.value).replace(
            "ranks [1]", "rank 1"
        )
        return type(caught.value).__name__


@pytest.mark.parametrize(("how", "error"), [("dies", "PeerLost"), ("closes", "PeerLost"), ("sleeps", "PeerTimeout")])
def test_the_rank_that_is_missing_is_named(how, error):
    # Ranks 0 and 2 wait for rank 1; whoever of them gives up first may be missed by the other.
    assert run_ranks(rank_dies, 2, how, expect_dead=(1,) if how == "dies" else ())[0] == error


def one_never_comes() -> str:
    if os.environ["RANK"] == "2":
        return "stayed away"
    with pytest.raises(PeerTimeout) as caught:
        moe_runtime.init({"transport": "zeromq", "timeout_s": 3})
    return str(caught.value)


def test_rank_0_names_who_did_not_come():
    assert "ranks [2] did not come" in run_ranks(one_never_comes, 3)[0]


def ranks_disagree(folder) -> str:
    cluster = folder / f"cluster-{os.environ['RANK']}.toml"
    speed = 1 + int(os.environ["RANK"] == "1")
    cluster.write_text(f'[[node]]\nname = "a"\ndevices = 2\nspeed = {speed}\n')
    with pytest.raises(ConfigError) as caught:
        moe_runtime.init({**ZEROMQ, "cluster": str(cluster)})
    return str(caught.value)


def test_ranks_with_other_cluster_files_are_told_so_before_anything_else(tmp_path):
    assert all("rank 1 disagrees with rank 0 on cluster" in said for said in run_ranks(ranks_disagree, 2, tmp_path))


def listens_on() -> set[str]:
    with moe_runtime.init(ZEROMQ) as runtime:
        runtime.transport.barrier("test")
        mine = set()
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
                mine.add(os.readlink(f"/proc/self/fd/{fd}"))
        listening = set()
        for line in open("/proc/self/net/tcp").read().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                listening.add(fields[1].partition(":")[0])
        runtime.transport.barrier("test")
        return listening


def test_it_listens_on_loopback_only():
    assert run_ranks(listens_on, 2) == [{"0100007F"}] * 2


def generates(folder) -> list:
    with moe_runtime.init(ZEROMQ) as runtime:
        model = runtime.load_model(folder, dtype=torch.float32)
        ids = torch.arange(2, 12).view(1, -1)[: 1 - runtime.rank]  # rank 1 has no sequence
        return model.generate(ids, max_new_tokens=5, do_sample=False).tolist()


def test_generation_with_an_idle_rank(tmp_path):
    model = write_checkpoint(tmp_path, "deepseek_v4")
    expected = model.generate(torch.arange(2, 12).view(1, -1), max_new_tokens=5, do_sample=False).tolist()
    assert run_ranks(generates, 2, tmp_path) == [expected, []]
