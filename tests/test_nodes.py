"""Dispatch over several nodes (here: groups of CPU ranks): a token crosses to each node once, results are the same.

Also halves of a dispatch: started, waited for later, two under way at once; and rows that travel in other formats.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from test_dispatch import CASES, GRADIENT_CASES, Case, apply_experts, as_bytes, assert_equals_oracle, check_gradients
from test_families import SPLITS, check_rank, write_oracle

import moe_runtime
from moe_runtime.comm.dispatch import Dispatcher
from moe_runtime.comm.nodes import NodeDispatcher, gateways
from moe_runtime.comm.threads import ThreadWorld
from moe_runtime.errors import ConfigError

DEVICES = {3: [2, 1], 4: [2, 2]}  # ranks of each node, by world size


def cluster_file(folder, devices: list[int]) -> str:
    nodes = [f'[[node]]\nname = "n{n}"\nvendor = "cpu"\ndevices = {count}\n' for n, count in enumerate(devices)]
    (folder / "nodes.toml").write_text("".join(nodes))
    return str(folder / "nodes.toml")


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_gateways_are_in_their_node_and_shared_fairly(devices):
    rank_node = [node for node, count in enumerate(devices) for _ in range(count)]
    table = np.array([gateways(rank_node, rank) for rank in range(len(rank_node))])  # [R, nodes]
    for rank, node in enumerate(rank_node):
        assert table[rank, node] == rank, "rows for one's own node stay"
        assert [rank_node[gateway] for gateway in table[rank]] == list(range(len(devices)))
    for node, senders in enumerate(
        devices
    ):  # of the senders of one node, a gateway serves at most one more than others
        for other, receivers in enumerate(devices):
            used = np.bincount(table[np.array(rank_node) == node][:, other] - sum(devices[:other]), minlength=receivers)
            assert used.max() - used.min() <= 1 and used.sum() == senders


def every_case(cluster: str) -> int:
    """Every case of the dispatch tests in both forms against the oracle, with the number of rows that crossed."""
    with moe_runtime.init({"timeout_s": 60, "cluster": cluster}) as runtime:
        nodes = [node.name for node in runtime._cluster.rank_nodes()]
        for name, case in CASES.items():
            for expand in (True, False):
                placement, (x, ids, weights) = case.placement(runtime.size), case.tokens_of(runtime.rank)
                dispatcher = runtime.dispatcher(case.hidden, case.experts, case.top_k, case.dtype, placement)
                assert isinstance(dispatcher._dispatcher, NodeDispatcher)
                before = dispatcher._dispatcher.rows_between_nodes
                rows, handle = dispatcher.dispatch(x, ids, weights, expand=expand)
                y = dispatcher.combine(apply_experts(case, placement, runtime.rank, rows, handle), handle)
                try:
                    assert_equals_oracle(case, y, x, ids, weights)
                except AssertionError as error:
                    raise AssertionError(f"{name}, expand={expand}: {error}") from error
                if not placement.has_replicas():
                    owner = dict(zip(placement.slot_expert[0].tolist(), placement.slot_rank.tolist(), strict=True))
                    crossings = {(t, nodes[owner[e]]) for t, row in enumerate(ids.tolist()) for e in row if e >= 0}
                    crossings = {pair for pair in crossings if pair[1] != nodes[runtime.rank]}
                    assert dispatcher._dispatcher.rows_between_nodes - before == len(crossings), name
        assert "crosses to each node once" in runtime.describe()
        return len(CASES)


@pytest.mark.parametrize("size", [3, 4])
def test_every_case_equals_the_oracle_and_crosses_each_node_pair_once(tmp_path, size):
    assert run_ranks(every_case, size, cluster_file(tmp_path, DEVICES[size])) == [len(CASES)] * size


def gradients(cluster: str) -> int:
    with moe_runtime.init({"timeout_s": 60, "cluster": cluster}) as runtime:
        return sum(
            check_gradients(runtime, case, expand) for case in GRADIENT_CASES.values() for expand in (True, False)
        )


def test_gradients_equal_plain_torch(tmp_path):
    assert run_ranks(gradients, 4, cluster_file(tmp_path, [2, 2])) == [2 * len(GRADIENT_CASES)] * 4


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v4"])
def test_a_model_over_two_nodes_equals_one_process(tmp_path, family):
    write_oracle(tmp_path, family)
    run_ranks(check_rank, 4, tmp_path, SPLITS[4], {"cluster": cluster_file(tmp_path, [2, 2])})


# ---------------------------------------------------------------- halves


def two_halves(cluster: str | None) -> int:
    """Two batches under way at once, waited for in order; a cached handle; the same bits as one after the other."""
    case = Case(tokens=(9, 6, 12, 0), routing="holes")
    with moe_runtime.init({"timeout_s": 30, "cluster": cluster}) as runtime:
        placement, (x, ids, weights) = case.placement(runtime.size), case.tokens_of(runtime.rank)
        dispatcher = runtime.dispatcher(case.hidden, case.experts, case.top_k, case.dtype, placement)
        half = len(x) // 2
        halves = [(x[:half], ids[:half], weights[:half]), (x[half:], ids[half:], weights[half:])]

        def results(rows, handle):
            return apply_experts(case, placement, runtime.rank, rows, handle)

        for expand in (True, False):
            expected = []
            for part in halves:
                rows, handle = dispatcher.dispatch(*part, expand=expand)
                expected.append(dispatcher.combine(results(rows, handle), handle))
            waits = [dispatcher.start_dispatch(*part, expand=expand) for part in halves]
            arrived = [wait() for wait in waits]
            with pytest.raises(RuntimeError, match="finished already"):
                waits[0]()
            homes = [dispatcher.start_combine(results(rows, handle), handle) for rows, handle in arrived]
            assert all(torch.equal(home(), y) for home, y in zip(homes, expected, strict=True))
            rows, again = dispatcher.dispatch(*halves[0], expand=expand, handle=arrived[0][1])
            assert torch.equal(dispatcher.combine(results(rows, again), again), expected[0])
        return half


@pytest.mark.parametrize("devices", [None, [2, 1]])
def test_two_halves_of_a_batch_may_be_under_way_together(tmp_path, devices):
    run_ranks(two_halves, 3, devices and cluster_file(tmp_path, devices))


# ---------------------------------------------------------------- wire formats

MIXED = [
    ["float32", "float8_e4m3fn", "int8"],
    ["float8_e4m3fn", "float32", "float8_e4m3fnuz"],
    ["int8", "float8_e4m3fnuz", "float32"],
]
# The largest error of a value, as a part of its block's largest: half a step of the format.
ERRORS = {"float32": 0.0, "float8_e4m3fn": 1 / 16, "float8_e4m3fnuz": 1 / 16, "int8": 1 / 250, "bfloat16": 1 / 256}


def mixed_formats(transport) -> bytes:
    """Ranks trade rows in formats that differ by pair: within each format's error, and one's own rows exactly."""
    case = Case(tokens=(9, 6, 12), routing="holes", hidden=200)
    slot_rank = np.arange(case.experts, dtype=np.int32) * 3 // case.experts
    dispatcher = Dispatcher(
        transport, slot_rank, hidden_size=case.hidden, num_experts=case.experts, top_k=case.top_k, dtype=case.dtype,
        placement_digest=1, formats=MIXED,
    )  # fmt: skip
    x, ids, weights = case.tokens_of(transport.rank)
    x[:, 0] = 1.0
    rows, handle = dispatcher.dispatch(x, ids, weights)
    for source, got in enumerate(rows.split(handle.recv_counts)):
        sent, sent_ids, _ = case.tokens_of(source)
        sent[:, 0] = 1.0
        here = (slot_rank[sent_ids] == transport.rank) & (sent_ids.numpy() >= 0)
        expected = sent[torch.from_numpy(here.any(1))]
        allowed = ERRORS[MIXED[transport.rank][source]] * expected.abs().amax(1, keepdim=True)
        assert got.shape == expected.shape and ((got - expected).abs() <= allowed).all(), (source, transport.rank)
        if source != transport.rank and len(expected):
            assert not torch.equal(got, expected), "a scaled format approximates"
    return as_bytes(rows) + as_bytes(dispatcher.combine(rows * handle.topk_weights.sum(1, keepdim=True), handle))


def mixed_formats_over(kind: str) -> bytes:
    with moe_runtime.init({"transport": kind, "timeout_s": 30}) as runtime:
        return mixed_formats(runtime.transport)


def test_formats_may_differ_between_pairs_and_give_the_same_bits_on_every_transport():
    by_threads = ThreadWorld(3, 30.0).run(mixed_formats)
    for kind in ("gloo", "zeromq", "shm"):
        assert run_ranks(mixed_formats_over, 3, kind) == by_threads


def agrees(wire_format: str) -> tuple[str, str]:
    """What describe() says, and how far a model's rows travel from exact; gradients still flow."""
    with moe_runtime.init({"wire_format": wire_format, "timeout_s": 30}) as runtime:
        dispatcher = runtime.dispatcher(256, 8, 2, torch.float32)
        generator = torch.Generator().manual_seed(runtime.rank)
        x = torch.randn(12, 256, generator=generator).requires_grad_()
        ids, weights = torch.randint(0, 8, (12, 2), generator=generator), torch.full((12, 2), 0.5)
        rows, handle = dispatcher.dispatch(x, ids, weights, expand=False)
        y = dispatcher.combine(rows * handle.topk_weights.sum(1, keepdim=True), handle)
        y.sum().backward()
        torch.testing.assert_close(x.grad, torch.ones_like(x))  # as if nothing had been approximated
        return runtime.describe(), f"{float((y - x).abs().max() / x.abs().max()):.6f}"


@pytest.mark.parametrize(
    ("wire_format", "line", "error"),
    [
        ("exact", "rows travel as float32: ranks 0-1 with each other; exact", 1e-6),
        (
            "fp8,int8",
            "rows travel as float8_e4m3fn: ranks 0-1 with each other; one float32 scale per 128 values",
            1 / 16,
        ),
        ("int8, exact", "rows travel as int8: ranks 0-1 with each other; one float32 scale per 128 values", 1 / 250),
        (
            "bfloat16",
            "rows travel as bfloat16: ranks 0-1 with each other; narrower than float32, approximated",
            1 / 256,
        ),
    ],
)
def test_the_agreement_is_told_and_kept(wire_format, line, error):
    for told, seen in run_ranks(agrees, 2, wire_format):
        assert line in told
        assert (float(seen) <= error) and (float(seen) > 1e-4 or error < 1e-4)


def cannot_agree(cluster: str) -> str:
    with moe_runtime.init({"wire_format": "fp8", "timeout_s": 60, "cluster": cluster}) as runtime:
        with pytest.raises(ConfigError) as caught:
            runtime.dispatcher(16, 8, 2)
        return str(caught.value)


def test_a_pair_that_cannot_agree_is_named(tmp_path):
    (tmp_path / "c.toml").write_text(
        '[[node]]\nname = "a"\nemulate = "cambricon"\n[[node]]\nname = "b"\nvendor = "cpu"\n'
    )
    for said in run_ranks(cannot_agree, 2, str(tmp_path / "c.toml")):
        assert "rank 0 (cambricon (emulated))" in said and "rank 1 (cpu)" in said and "\n" not in said


def ranks_differ_on_formats() -> str:
    with moe_runtime.init({"timeout_s": 20}) as runtime:
        runtime.config.__dict__["wire_format"] = "exact" if runtime.rank else "int8"
        with pytest.raises(ConfigError) as caught:
            runtime.dispatcher(16, 8, 2)
        return str(caught.value)


def test_ranks_with_other_wire_formats_are_told_so_before_the_first_exchange():
    assert all("rank 1 disagrees with rank 0 on wire formats" in said for said in run_ranks(ranks_differ_on_formats, 2))
