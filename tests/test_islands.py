"""Islands of emulated vendors and a CPU island, joined over the bridge: one world, and native rows never leave home.

Emulated: each vendor's device is host memory behind PyTorch's PrivateUse1, its collective library is gloo under the
vendor's documented limits. Rows are device tensors all the way.
"""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from families import write_checkpoint
from ranks import run_ranks
from test_bridge import check_exchanges, rank_goes_missing
from test_families import SPLITS, check_rank, write_oracle
from test_transports import mpirun

import moe_runtime
from moe_runtime.comm.emulation.collectives import EmulatedGroup
from moe_runtime.comm.emulation.device import emulate
from moe_runtime.comm.islands import form_islands
from moe_runtime.comm.vendors import VENDORS
from moe_runtime.errors import ConfigError, VendorUnavailable

# Two ascend ranks that are not neighbours, one biren, one cpu; speeds give 16 experts as 5, 3, 3, 5.
CLUSTER = """
[[node]]
name = "a"
emulate = "ascend"
speed = 2
[[node]]
name = "b"
emulate = "biren"
speed = 1
[[node]]
name = "c"
emulate = "ascend"
speed = 1
[[node]]
name = "d"
vendor = "cpu"
speed = 2
"""


# Three vendors and a CPU, a rank each; 16 experts as 5, 3, 3, 5.
THREE_VENDORS = CLUSTER.replace('name = "c"\nemulate = "ascend"', 'name = "c"\nemulate = "moore_threads"')


@pytest.fixture
def cluster(tmp_path) -> str:
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    return str(tmp_path / "cluster.toml")


def test_islands_are_maximal_and_in_rank_order():
    islands = form_islands(["ascend", "biren", "ascend", "cpu"])
    assert islands.kinds == ("ascend", "biren", "cpu")
    assert islands.ranks == ((0, 2), (1,), (3,))
    assert [islands.of(rank) for rank in range(4)] == [0, 1, 0, 2]
    assert islands.leaders() == (0, 1, 3)


@pytest.mark.parametrize("nodes", [CLUSTER, THREE_VENDORS], ids=["two of one vendor", "three vendors and a CPU"])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4"])
def test_one_model_over_four_ranks_on_islands_equals_one_process(tmp_path, family, nodes):
    (tmp_path / "cluster.toml").write_text(nodes)
    write_oracle(tmp_path, family)
    run_ranks(check_rank, 4, tmp_path, SPLITS[4], {"cluster": str(tmp_path / "cluster.toml")})


STEPS, LEARNING_RATE = 4, 2e-3


def losses_of(model, ids: torch.Tensor, total: int, sync, whole) -> list[float]:
    """AdamW steps on the rank's sequences; the loss of each step over all ranks."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False)
    losses = []
    for _ in range(STEPS):
        logits = model(ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / total
        optimizer.zero_grad()
        loss.backward()
        sync(model)
        optimizer.step()
        losses.append(whole(loss.detach()))
    return losses


def trains(folder, cluster: str) -> tuple[list[float], str, dict]:
    with moe_runtime.init({"cluster": cluster, "timeout_s": 60}) as runtime:

        def whole(loss: torch.Tensor) -> float:
            value = loss.cpu().view(1)
            runtime.transport.all_reduce(value, "test loss")
            return float(value)

        ids = torch.load(folder / "ids.pt", weights_only=True)
        model = runtime.load_model(folder / "model", dtype=torch.float32)
        mine = ids[runtime.rank : runtime.rank + 1].to(runtime.device)
        losses = losses_of(model, mine, ids[:, 1:].numel(), runtime.sync_gradients, whole)
        assert {p.device.type for p in model.parameters()} == {runtime.device.type}
        return losses, str(runtime.device), runtime.transport.bytes_sent


@pytest.mark.parametrize("nodes", [CLUSTER, THREE_VENDORS], ids=["two of one vendor", "three vendors and a CPU"])
def test_a_model_on_islands_trains_to_the_same_loss_as_one_process(tmp_path, nodes):
    (tmp_path / "cluster.toml").write_text(nodes)
    torch.set_num_threads(1)
    model = write_checkpoint(tmp_path / "model", "deepseek_v3")
    ids = torch.randint(2, 128, (4, 16), generator=torch.Generator().manual_seed(3))
    torch.save(ids, tmp_path / "ids.pt")
    expected = losses_of(model, ids, ids[:, 1:].numel(), lambda model: None, float)
    assert expected[-1] < 0.9 * expected[0]
    for rank, (losses, device, sent) in enumerate(run_ranks(trains, 4, tmp_path, str(tmp_path / "cluster.toml"))):
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        assert device == ["npu:0", "supa:0", "npu:0" if nodes is CLUSTER else "musa:0", "cpu"][rank]
        assert sent["bridge"] > 0 and (sent["native"] > 0) == (nodes is CLUSTER and device == "npu:0")


def looks_around(cluster: str) -> tuple[str, int, dict, dict]:
    with moe_runtime.init({"cluster": cluster, "timeout_s": 30}) as runtime:
        transport = runtime.transport
        # One row to every rank, itself included.
        rows = torch.full((4, 3), float(runtime.rank), device=runtime.device)
        got = transport.all_to_all_v(rows, [1] * 4, [1] * 4, "test")
        assert got.device == rows.device and got[:, 0].tolist() == [0, 1, 2, 3]
        world = dist.get_world_size() if dist.is_initialized() else 1
        group = getattr(transport._native, "_group", None)
        return runtime.describe(), world, transport.bytes_sent, dict(getattr(group, "calls", {}))


def test_torch_distributed_never_spans_islands_and_native_rows_stay_inside(cluster):
    seen = run_ranks(looks_around, 4, cluster)
    assert [world for _, world, _, _ in seen] == [2, 1, 2, 1]
    assert [rows for _, _, rows, _ in seen] == [
        {"native": 12, "bridge": 24},
        {"native": 0, "bridge": 36},
        {"native": 12, "bridge": 24},
        {"native": 0, "bridge": 36},
    ]
    # The emulated HCCL was asked once on each of its two ranks, and refuses members of any other vendor.
    assert [calls for _, _, _, calls in seen] == [{"all_to_all_single": 1}, {}, {"all_to_all_single": 1}, {}]
    told = seen[0][0].splitlines()
    assert "islands: ascend (emulated) [0, 2]; biren (emulated) [1]; cpu [3]" in told
    row = next(line for line in told if line.startswith("rank 0 ") and "bridge" in line)
    assert row.split("  ")[-1].strip() == "bridge" and "self" in row and "ascend (emulated)" in row
    assert "place: ascend (emulated), device npu:0" in told
    assert any("emulated: its device is host memory" in line for line in told)


def exchanges(cluster: str, bridge: str = "zeromq") -> str:
    return check_exchanges({"cluster": cluster, "timeout_s": 30, "bridge": bridge})


INSIDE = [f"{name} inside" for name in ("torch.distributed:hccl (HCCL emulated)", "local") * 2]


@pytest.mark.parametrize(("bridge", "name"), [("zeromq", "zeromq"), ("gloo", "torch.distributed:gloo")])
def test_the_composite_passes_the_bridges_exchanges(cluster, bridge, name):
    said = run_ranks(exchanges, 4, cluster, bridge)
    assert said == [f"islands ({inside}, bridge:{name} between)" for inside in INSIDE]


def test_the_composite_over_mpi_passes_the_bridges_exchanges(cluster):
    code, said = mpirun(f"islands {cluster}", 4)
    assert code == 0
    for rank, inside in enumerate(INSIDE):
        assert said[rank]["name"].startswith(f"islands ({inside}, bridge:mpi:"), said


# Two islands of one emulated vendor, so that an emulated library can stand in FlagCX's place and join them.
APART = "".join(f'[[node]]\nname = "{name}"\nemulate = "ascend"\nisland = "{name}"\ndevices = 2\n' for name in "xy")


def over_flagcx(cluster: str, installed: bool) -> tuple[str, dict]:
    settings = {"cluster": cluster, "timeout_s": 30, "bridge": "flagcx"}
    if not installed:
        with pytest.raises(VendorUnavailable, match="FlagCX's torch plug-in is not here"):
            moe_runtime.init(settings)
        return "", {}
    emulate("ascend")
    groups = []

    def create(store, rank, size, timeout):
        groups.append(EmulatedGroup(VENDORS["ascend"], "npu", store, rank, size, timeout))
        return groups[-1]

    dist.Backend.register_backend("flagcx", create, devices=["npu"])
    sys.modules["flagcx"] = types.ModuleType("flagcx")
    return check_exchanges(settings), dict(groups[0].calls)


def test_flagcx_joins_islands_where_it_is_installed(tmp_path):
    (tmp_path / "cluster.toml").write_text(APART)
    for name, calls in run_ranks(over_flagcx, 4, str(tmp_path / "cluster.toml"), True):
        assert name == "islands (torch.distributed:hccl (HCCL emulated) inside, "  \
            "bridge:torch.distributed:flagcx (FlagCX) between)"  # fmt: skip
        assert calls == {"all_to_all_single": 1}, "rows of devices, and nothing else"
    run_ranks(over_flagcx, 4, str(tmp_path / "cluster.toml"), False)


def ranks_of_two_clusters(first: str, second: str) -> str:
    cluster = second if os.environ["RANK"] == "1" else first
    with pytest.raises(ConfigError) as caught:
        moe_runtime.init({"cluster": cluster, "timeout_s": 30, "bridge": "gloo"})
    return str(caught.value)


def test_ranks_with_other_cluster_files_are_told_so_over_every_bridge(tmp_path):
    for name, speed in (("a", 1), ("b", 2)):
        text = f'[[node]]\nname = "a"\nspeed = {speed}\n[[node]]\nname = "b"\nspeed = 1\nisland = "other"\n'
        (tmp_path / f"{name}.toml").write_text(text)
    for said in run_ranks(ranks_of_two_clusters, 2, str(tmp_path / "a.toml"), str(tmp_path / "b.toml")):
        assert "rank 1 disagrees with rank 0 on cluster" in said


def apart(cluster: str) -> tuple[str, list[str]]:
    with moe_runtime.init({"cluster": cluster, "timeout_s": 30}) as runtime:
        return runtime.place.kind, [runtime.transport.path(runtime.rank, to) for to in range(3)]


def test_nodes_of_one_vendor_that_do_not_reach_each_other_are_two_islands(tmp_path):
    nodes = [f'[[node]]\nname = "{n}"\nvendor = "cpu"\nisland = "{i}"\n' for n, i in ("ax", "by", "cx")]
    (tmp_path / "cluster.toml").write_text("".join(nodes))
    assert run_ranks(apart, 3, str(tmp_path / "cluster.toml")) == [
        ("cpu x", ["self", "bridge", "cpu x"]),
        ("cpu y", ["bridge", "self", "bridge"]),
        ("cpu x", ["cpu x", "bridge", "self"]),
    ]


def goes_missing(cluster: str, how: str) -> str:
    return rank_goes_missing(how, {"cluster": cluster, "timeout_s": 4})


@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_missing_rank_ends_the_wait(cluster, how):
    said = run_ranks(goes_missing, 4, cluster, how, expect_dead=(1,) if how == "dies" else ())
    assert said[0] in ("PeerLost", "PeerTimeout")


# Each vendor with a limit of its own in all-to-all: even splits of 512 bytes, a buffer sized before start.
LIMITED = """
[[node]]
name = "a"
emulate = "biren"
devices = 2
[[node]]
name = "b"
emulate = "enflame"
devices = 2
"""


def test_a_model_within_the_limits_of_biren_and_enflame_equals_one_process(tmp_path):
    (tmp_path / "cluster.toml").write_text(LIMITED)
    write_oracle(tmp_path, "deepseek_v3")
    settings = {"cluster": str(tmp_path / "cluster.toml")}
    run_ranks(check_rank, 4, tmp_path, SPLITS[4], settings, env={"ECCL_ALLTOALLV_MAXSIZE": str(1 << 20)})


def exceeds_the_buffer(cluster: str) -> str:
    with moe_runtime.init({"cluster": cluster, "timeout_s": 5}) as runtime:
        if runtime.rank < 2:
            return ""
        with pytest.raises(ConfigError) as caught:
            rows = torch.zeros(2, 300, device=runtime.device)
            runtime.transport._native.all_to_all_v(rows, [1, 1], [1, 1], "test")
        return str(caught.value)


def test_a_message_larger_than_enflames_buffer_names_the_variable_to_set(tmp_path):
    (tmp_path / "cluster.toml").write_text(LIMITED)
    cluster = str(tmp_path / "cluster.toml")
    said = run_ranks(exceeds_the_buffer, 4, cluster, env={"ECCL_ALLTOALLV_MAXSIZE": "1000"})
    assert "2400 bytes" in said[2] and "set ECCL_ALLTOALLV_MAXSIZE" in said[2]


def refuses(cluster: str) -> str:
    with pytest.raises(VendorUnavailable) as caught:
        moe_runtime.init({"cluster": cluster})
    return str(caught.value)


def test_a_vendor_that_is_not_emulated_is_refused_rather_than_pretended(tmp_path):
    (tmp_path / "cluster.toml").write_text('[[node]]\nname = "a"\nvendor = "ascend"\n')
    assert "emulate" in run_ranks(refuses, 1, str(tmp_path / "cluster.toml"))[0]
