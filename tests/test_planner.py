"""plan(): what every plan obeys, what its bound proves, and how good it is on a load that anyone can make."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime import Placement
from moe_runtime.core.cluster import Cluster, Link, Node
from moe_runtime.errors import ConfigError
from moe_runtime.experts import placement, traces
from moe_runtime.experts.placement import Rank, eplb, plan, rebalance_experts, split
from moe_runtime.experts.placement.nodes import internode_tokens, replicas_taken

FEW = settings(max_examples=40, deadline=None)
COUNTS = st.one_of(st.integers(0, 5), st.integers(0, 1000))


@st.composite
def problems(draw, most_experts: int = 12, most_ranks: int = 5, layers: int = 2):
    """(load [L, E], ranks with slots of their own, shares): always enough slots, often unequal ones."""
    num_experts, num_ranks = draw(st.integers(1, most_experts)), draw(st.integers(1, most_ranks))
    load = np.array(draw(st.lists(COUNTS, min_size=layers * num_experts, max_size=layers * num_experts)), float)
    slots = draw(st.lists(st.integers(0, num_experts), min_size=num_ranks, max_size=num_ranks))
    while sum(slots) < num_experts:
        slots[slots.index(min(slots))] += 1
    kinds = st.tuples(st.sampled_from([1.0, 1.0, 0.5, 0.3]), st.sampled_from([0.0, 0.0, 3.0]), st.integers(0, 1))
    kinds = draw(st.lists(kinds, min_size=num_ranks, max_size=num_ranks))
    ranks = [
        Rank(speed=speed, seconds_per_expert=fixed, node=node, slots=count)
        for (speed, fixed, node), count in zip(kinds, slots, strict=True)
    ]
    return load.reshape(layers, num_experts), ranks


def check(made: placement.Plan, load: np.ndarray, ranks: list[Rank]) -> None:
    """Valid by core's own rules (a Placement checks itself), within the slots, and never below its bound."""
    assert isinstance(made, Placement) and made.slot_expert.shape == (len(load), sum(rank.slots for rank in ranks))
    assert np.bincount(made.slot_rank, minlength=len(ranks)).tolist() == [rank.slots for rank in ranks]
    for layer in range(len(load)):
        assert set(made.slot_expert[layer].tolist()) == set(range(load.shape[1]))
        for rank in range(len(ranks)):
            held = made.rank_experts(layer, rank)
            assert len(held) == len(set(held))
        shares = np.bincount(made.slot_expert[layer], made.slot_share[layer])
        assert np.allclose(shares, 1) and (made.slot_share[layer] >= 0).all()
    assert (made.bound(load) <= made.times(load).max(axis=1) * (1 + 1e-9)).all()
    assert made.times(load).shape == (len(load), len(ranks))


@FEW
@given(problems(), st.sampled_from(["fast", "eplb", "robust"]), st.sampled_from(["free", "equal"]))
def test_every_plan_is_valid_and_above_its_bound(drawn, policy, shares):
    load, ranks = drawn
    made = plan(load, ranks, policy=policy, shares=shares)
    check(made, load, ranks)
    if shares == "equal" or policy == "eplb":
        copies = eplb.invert(made.slot_expert, made.num_experts)[1]
        assert np.allclose(made.slot_share, 1 / np.take_along_axis(copies, made.slot_expert.astype(int), axis=1))
    assert "no placement can be below" in made.describe()


@FEW
@given(problems(), st.data())
def test_a_plan_is_a_pure_function_of_its_arguments(drawn, data):
    load, ranks = drawn
    policy = data.draw(st.sampled_from(["fast", "eplb", "robust"]))
    one, other = (plan(found, ranks, policy=policy) for found in (load, load.copy()))
    assert one.digest() == other.digest()
    if all(rank.seconds_per_expert == 0 for rank in ranks):  # a power of two changes no rounding, so no decision
        assert plan(load * 4, ranks, policy=policy).digest() == one.digest()


def test_ties_go_to_the_lower_rank_and_expert():
    made = plan(np.ones((1, 6)), 2, 6)
    assert [made.rank_experts(0, rank) for rank in (0, 1)] == [[0, 2, 4], [1, 3, 5]]
    made = plan(np.ones((1, 4)), 2, 6)
    assert np.bincount(made.slot_expert[0]).tolist() == [2, 2, 1, 1]


# ---------------------------------------------------------------- the bound


def best_by_force(load_E: np.ndarray, ranks: list[Rank]) -> float:
    """The slowest rank's time of the best placement: every choice of experts per rank, shares by linear program."""
    from scipy.optimize import linprog

    num_experts, best = len(load_E), np.inf
    choices = [
        [c for n in range(min(rank.slots, num_experts) + 1) for c in itertools.combinations(range(num_experts), n)]
        for rank in ranks
    ]
    cost = [1 / rank.speed for rank in ranks]
    for held in itertools.product(*choices):
        if set(itertools.chain(*held)) != set(range(num_experts)):
            continue
        where = [(rank, expert) for rank, experts in enumerate(held) for expert in experts]
        # Tokens per (rank, expert), then T; every active expert costs its rank, the empty ones are dropped by `held`.
        equal = np.zeros((num_experts, len(where) + 1))
        most = np.zeros((len(ranks), len(where) + 1))
        most[:, -1] = -1
        for at, (rank, expert) in enumerate(where):
            equal[expert, at] = 1
            most[rank, at] = cost[rank]
        fixed = [
            rank.seconds_per_expert * sum(load_E[e] > 0 for e in experts)
            for rank, experts in zip(ranks, held, strict=True)
        ]
        found = linprog([0] * len(where) + [1], most, -np.array(fixed), equal, load_E)
        best = min(best, found.fun)
    return best


@settings(max_examples=25, deadline=None)
@given(problems(most_experts=4, most_ranks=3, layers=1))
def test_no_placement_at_all_beats_the_bound(drawn):
    load, ranks = drawn
    ranks = [replace(rank, slots=min(rank.slots, 3)) for rank in ranks]
    if sum(rank.slots for rank in ranks) < load.shape[1]:
        return
    best = best_by_force(load[0], ranks)
    made = plan(load, ranks)
    assert made.bound()[0] <= best + 1e-6 * (1 + best)
    assert made.times().max() >= best - 1e-6 * (1 + best)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=4, max_size=5))
def test_no_placement_beats_the_bound_for_two_slots(counts):
    ranks = [Rank(slots=2)] * 3
    load = np.array([counts], float)
    best = best_by_force(load[0], ranks)
    assert plan(load, ranks).bound()[0] <= best * (1 + 1e-9) + 1e-9


@settings(max_examples=10, deadline=None)
@given(problems(most_experts=6, most_ranks=3, layers=1))
def test_the_exact_solver_agrees_with_the_bound_and_is_not_beaten(drawn):
    load, ranks = drawn
    exact = plan(load, ranks, policy="exact", time_limit=10)
    check(exact, load, ranks)
    fast = plan(load, ranks)
    assert exact.times().max() <= fast.times().max() * (1 + 1e-5) + 1e-6
    assert "HiGHS: no placement can be below" in exact.describe()


def test_the_pairs_bound_is_stronger_than_the_simple_one_and_still_holds():
    random = np.random.default_rng(2)
    load = random.lognormal(0, 1, (3, 14)) * 100
    made = plan(load, 8, 16)
    assert (made.bound() >= made.bound(simple=True)).all()
    exact = plan(load, 8, 16, policy="exact", time_limit=8)
    assert (made.bound() <= exact.times().max(axis=1) * (1 + 1e-6)).all()
    assert (made.bound() > made.bound(simple=True) * 1.005).any()


def test_the_simple_bound_is_the_formula_for_equal_ranks():
    load = traces.synthetic_load(4)
    for ranks, slots in ((32, 288), (144, 288)):
        bound = plan(load, ranks, slots).bound(simple=True)
        for load_E, time in zip(load, bound, strict=True):
            assert time >= load_E.sum() / ranks * (1 - 1e-9)
            assert np.ceil(load_E / (time * (1 + 1e-6))).sum() <= slots
            below = time * (1 - 1e-6)
            assert below < load_E.sum() / ranks or np.ceil(load_E / below).sum() > slots


# ---------------------------------------------------------------- figures that may not get worse


@pytest.fixture(scope="module")
def load() -> np.ndarray:
    return traces.synthetic_load()


@pytest.mark.parametrize(("ranks", "simple", "full"), [(32, 0.998, 0.998), (72, 0.99, 0.99), (144, 0.9, 0.985)])
def test_plans_are_near_the_bound_and_better_than_the_greedy(load, ranks, simple, full):
    made = plan(load, ranks, 288)
    slowest = made.times().max(axis=1).sum()
    assert made.bound(simple=True).sum() / slowest >= simple and made.ratio() >= full
    greedy = eplb.table_balancedness(eplb.greedy_tables(load, 288, 1, 1, ranks), load, ranks)
    assert made.balancedness() > greedy
    assert plan(load, ranks, 288, shares="equal").balancedness() >= greedy - 1e-9


def test_planning_58_layers_takes_milliseconds(load):
    plan(load, 32, 288)
    times = [plan(load, 32, 288).milliseconds for _ in range(5)]
    assert min(times) < 60, times


def test_unequal_ranks_are_used_by_speed_within_their_memory(load):
    ranks = [
        Rank(speed=speed, memory_bytes=gib * 2**30) for speed, gib in ((1, 64), (0.5, 48), (0.25, 32)) for _ in range(8)
    ]
    for slots in (288, None):
        made = plan(load, ranks, slots, bytes_per_expert=44e6)
        assert made.times().max(axis=1).sum() <= 1.03 * made.bound().sum()
        held = np.bincount(made.slot_rank, minlength=24) * 44e6 * len(load)
        assert (held <= [rank.memory_bytes for rank in ranks]).all()


def test_split_recovers_what_a_shift_costs():
    base = traces.synthetic_load(8)
    shifted = base * np.random.default_rng(0).lognormal(0, 0.2, base.shape)
    made = plan(base, 32, 288)
    assert made.balancedness(shifted, "split") > made.balancedness(shifted) + 0.02
    smoothed = plan(base, 32, 288, smoothing=0.3)
    assert min(found.balancedness(shifted, "split") for found in (made, smoothed)) > 0.9
    assert smoothed.balancedness() > 0.97


def test_a_robust_plan_is_better_where_the_other_workload_is_the_worst():
    random = np.random.default_rng(0)
    base = traces.synthetic_load(6)
    loads = np.stack([base, base * random.lognormal(0, 0.8, base.shape), base * random.lognormal(0, 0.8, base.shape)])
    robust, fitted = plan(loads, 32, 288), plan(base, 32, 288)
    assert robust.policy == "robust"
    worst = [min(made.balancedness(found, "split") for found in loads) for made in (robust, fitted)]
    assert worst[0] > worst[1] + 0.02


# ---------------------------------------------------------------- split


@FEW
@given(problems(layers=1), st.data())
def test_split_shares_sum_to_one_and_are_as_good_as_a_linear_program(drawn, data):
    from scipy.optimize import linprog

    load, ranks = drawn
    ranks = [replace(rank, seconds_per_expert=0.0) for rank in ranks]
    made = plan(load, ranks)
    batch = np.array(data.draw(st.lists(COUNTS, min_size=load.shape[1], max_size=load.shape[1])), float)
    share = split(batch, (made, 0), 400)
    assert np.allclose(np.bincount(made.slot_expert[0], share), 1) and (share >= 0).all()
    cost = made.ranks.cost[made.slot_rank]
    slots = np.arange(made.num_slots)
    most = np.zeros((len(ranks), made.num_slots + 1))
    most[made.slot_rank, slots], most[:, -1] = cost, -1
    equal = np.zeros((made.num_experts, made.num_slots + 1))
    equal[made.slot_expert[0], slots] = 1
    best = linprog([0] * made.num_slots + [1], most, np.zeros(len(ranks)), equal, batch).fun
    assert made.times(batch[None], "split").max() <= best * 1.02 + 1e-6


def test_split_is_the_same_bits_compiled_or_not(load):
    from moe_runtime.experts.placement import kernels

    made = plan(load[:1], 32, 288)
    compiled = kernels.split_tokens
    args = made.slot_expert[0], made.slot_rank, load[0] * 1.7, made.ranks.cost, made.ranks.fixed
    start = kernels.equal_tokens(made.slot_expert[0], load[0] * 1.7)
    plain = getattr(compiled, "py_func", compiled)
    assert np.array_equal(compiled(*args, start.copy(), 5, 1e-4), plain(*args, start.copy(), 5, 1e-4))


def test_without_numba_the_same_functions_run_as_python():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import numpy as np\n"
        "from moe_runtime.experts import placement\n"
        "load = np.random.default_rng(0).integers(1, 99, (2, 12)).astype(float)\n"
        "for ranks, slots in ((4, 16), (8, 16)):\n"
        "    made = placement.plan(load, ranks, slots)\n"
        "    print(made.digest())\n"
        "print(made.describe())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = np.random.default_rng(0).integers(1, 99, (2, 12)).astype(float)
    expected = [str(plan(found, ranks, slots).digest()) for ranks, slots in ((4, 16), (8, 16))]
    assert ran.stdout.splitlines()[:2] == expected and "plain Python" in ran.stdout


def test_importing_the_library_loads_neither_numba_nor_scipy_nor_torch():
    code = (
        "import sys, moe_runtime.experts.placement, moe_runtime.experts.traces\n"
        "print([name for name in ('numba', 'scipy', 'torch') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr


# ---------------------------------------------------------------- warm, nodes


@FEW
@given(problems(), st.integers(0, 2**32 - 1))
def test_a_warm_plan_is_valid_and_never_worse_than_where_it_started(drawn, seed):
    load, ranks = drawn
    start = plan(np.random.default_rng(seed).integers(0, 100, load.shape), ranks)
    made = plan(load, ranks, start=start)
    check(made, load, ranks)
    assert made.policy == "warm"
    if all(rank.seconds_per_expert == 0 for rank in ranks):
        # Both shares come from the same pouring, which stops within a thousandth a sweep.
        assert made.times().max(axis=1).sum() <= start.times(load, "split").max(axis=1).sum() * 1.02 + 1e-6


def test_the_price_of_moves_decides_how_many_are_made():
    base = traces.synthetic_load(4)
    start = plan(base, 16, 288)
    now = base * np.random.default_rng(0).lognormal(0, 0.4, base.shape)
    moves, slowest = [], []
    for price in (1.0, 300.0, 1e9):
        made = plan(now, 16, 288, start=start, move_cost=price)
        moves.append(made.moves_from(start))
        slowest.append(made.times().max(axis=1).sum())
    assert moves[0] > moves[1] > moves[2] == 0 and slowest[0] < slowest[1] < slowest[2]
    assert moves[1] < plan(now, 16, 288).moves_from(start) / 5


def crossings(made: Placement, ids: np.ndarray, node: np.ndarray) -> float:
    part = np.bincount(node) / len(node)
    taken = [
        replicas_taken(ids[:, layer], made.slot_expert[layer], made.slot_share[layer])
        for layer in range(made.num_layers)
    ]
    return float(np.mean([internode_tokens(node[made.slot_rank], found, len(part), part) for found in taken]))


def test_a_plan_by_routing_trades_crossings_for_balance():
    base = traces.synthetic_load(2, 64)
    ids = traces.synthetic_routing(base, 600, top_k=6)
    node = np.repeat(np.arange(4), 4)
    ranks = [Rank(node=int(where), slots=5) for where in node]
    fast = plan(base, ranks)
    tight, loose = (plan(base, ranks, routing=ids, spread=spread) for spread in (0.02, 0.5))
    check(tight, base, ranks)
    assert crossings(tight, ids, node) < crossings(fast, ids, node) * 0.95
    assert crossings(loose, ids, node) <= crossings(tight, ids, node)
    assert tight.balancedness() > 0.9 and tight.balancedness() >= loose.balancedness() - 0.01
    assert "crossings between nodes" in tight.describe()


@FEW
@given(st.integers(0, 2**32 - 1))
def test_replicas_taken_follow_the_expert_and_its_shares(seed):
    random = np.random.default_rng(seed)
    made = plan(random.integers(1, 50, (1, 6)), 3, 9)
    ids = random.integers(-1, 6, (2000, 2))
    taken = replicas_taken(ids, made.slot_expert[0], made.slot_share[0])
    assert ((taken == -1) == (ids == -1)).all()
    assert (made.slot_expert[0][taken[ids >= 0]] == ids[ids >= 0]).all()
    everyone = replicas_taken(np.zeros((2000, 1), int), made.slot_expert[0], made.slot_share[0])
    share = np.bincount(everyone.ravel(), minlength=9) / 2000
    assert np.allclose(share, np.where(made.slot_expert[0] == 0, made.slot_share[0], 0), atol=0.01)


# ---------------------------------------------------------------- EPLB's interface


@pytest.mark.parametrize(
    ("experts", "replicas", "groups", "nodes", "gpus"),
    [(16, 24, 4, 2, 8), (256, 288, 8, 4, 32), (10, 13, 3, 2, 5), (7, 7, 1, 1, 3), (4, 4, 1, 1, 1)],
)
def test_the_drop_in_returns_what_eplb_returns(experts, replicas, groups, nodes, gpus):
    weight = torch.from_numpy(traces.synthetic_load(3, experts)).float()
    phy2log, log2phy, logcnt = rebalance_experts(weight, replicas, groups, nodes, gpus)
    assert phy2log.shape == (3, replicas) and logcnt.shape == (3, experts)
    assert log2phy.shape == (3, experts, int(logcnt.max()))
    assert {phy2log.dtype, log2phy.dtype, logcnt.dtype} == {torch.int64}
    for layer in range(3):
        assert torch.equal(torch.bincount(phy2log[layer], minlength=experts), logcnt[layer])
        for expert in range(experts):
            slots = log2phy[layer, expert]
            count = int(logcnt[layer, expert])
            assert count >= 1 and (slots[:count] >= 0).all() and (slots[count:] == -1).all()
            assert (phy2log[layer, slots[:count]] == expert).all()


def test_the_drop_in_is_better_balanced_than_the_greedy_and_has_no_expert_twice_on_a_gpu(load):
    table = rebalance_experts(torch.from_numpy(load), 288, 8, 4, 32)[0].numpy()
    greedy = eplb.greedy_tables(load, 288, 8, 4, 32)
    assert eplb.table_balancedness(table, load, 32) > max(0.97, eplb.table_balancedness(greedy, load, 32))
    for row in table.reshape(-1, 9):
        assert len(set(row.tolist())) == 9


def test_the_greedy_is_the_published_one_in_small():
    """The greedy's rule by hand: 90 gets the first replica (45, 45), then 50 (25, 25)."""
    table = eplb.greedy_tables(np.array([[90.0, 50.0, 20.0, 10.0]]), 6, 1, 1, 2)
    assert np.bincount(table[0]).tolist() == [2, 2, 1, 1]
    assert eplb.table_balancedness(table, np.array([[90.0, 50.0, 20.0, 10.0]]), 2) == pytest.approx(85 / 90)


# ---------------------------------------------------------------- what is refused, and clusters


REFUSED = {
    "a load that is no table": (lambda: plan(np.ones((1, 1, 1, 1)), 2), r"shape \(1, 1, 1, 1\)"),
    "a negative count": (lambda: plan([[1, 2], [3, -1]], 2), "layer 1 of the load"),
    "no number": (lambda: plan([[1, np.nan]], 2), "layer 0 of the load"),
    "words": (lambda: plan([["a"]], 2), "no array of numbers"),
    "no ranks": (lambda: plan(np.ones((1, 4)), []), "no ranks"),
    "too few slots": (lambda: plan(np.ones((1, 4)), 2, 3), "3 slots for 4 experts"),
    "too many slots": (lambda: plan(np.ones((1, 4)), 2, 9), "hold at most 8"),
    "too little memory": (
        lambda: plan(np.ones((2, 4)), [Rank(memory_bytes=10)] * 2, bytes_per_expert=4),
        "2 slots for 4 experts.* memory",
    ),
    "experts of no size": (
        lambda: plan(np.ones((1, 4)), 2, bytes_per_expert=0),
        "bytes_per_expert = 0 must be above 0",
    ),
    "fewer slots than ranks": (lambda: plan(np.ones((1, 2)), 3, 2), "2 slots for 3 ranks"),
    "a policy that is none": (lambda: plan(np.ones((1, 4)), 2, policy="best"), "no policy is called 'best'"),
    "too smooth": (lambda: plan(np.ones((1, 4)), 2, smoothing=2), "smoothing = 2.0 must be from 0 to 1"),
    "an option that is none": (lambda: plan(np.ones((1, 4)), 2, speed=3), "takes no 'speed'"),
    "shares that are none": (lambda: plan(np.ones((1, 4)), 2, shares="fair"), "neither"),
    "warm from nowhere": (lambda: plan(np.ones((1, 4)), 2, policy="warm"), "needs start="),
    "warm from other ranks": (
        lambda: plan(np.ones((1, 4)), 2, start=placement.proportional(1, 4, [1.0])),
        "start has other layers, or other slots",
    ),
    "nodes without routing": (lambda: plan(np.ones((1, 4)), 2, policy="nodes"), "needs routing="),
    "routing of unknown experts": (lambda: plan(np.ones((1, 4)), 2, routing=np.full((3, 1, 2), 4)), "outside 0..3"),
    "a speed of nothing": (lambda: Rank(speed=0), "speed = 0 must be a number above 0"),
    "counts of other experts": (lambda: split(np.ones(3), (plan(np.ones((1, 4)), 2), 0)), "for 4 experts"),
    "a load of another shape": (lambda: plan(np.ones((1, 4)), 2).times(np.ones((2, 4))), "a load of shape"),
    "an unknown dispatch": (lambda: plan(np.ones((1, 4)), 2).times(dispatch="lp"), "none of"),
    "no GPUs": (lambda: rebalance_experts(torch.ones(1, 4), 4, 1, 1, 0), "at least 1"),
    "exact with equal shares": (lambda: plan(np.ones((1, 4)), 2, policy="exact", shares="equal"), "unequal shares"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_planned_is_refused_in_one_line(name):
    call, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_cluster_file_gives_speeds_memory_and_links():
    cluster = Cluster(
        (Node("fast", devices=2, speed=2.0, memory_gib=1), Node("slow", devices=1, speed=1.0, memory_gib=0.5)),
        (Link(("fast", "slow"), gbit_s=8.0, latency_us=5.0),),
    )
    ranks = placement.ranks_of_cluster(cluster, seconds_per_token=1e-6, bytes_per_token=1000.0)
    # A third of the tokens begin on "slow" and cross a link of 1e9 bytes/s that two ranks share.
    assert ranks[0].seconds_on_links == pytest.approx(1000 / (1e9 / 2) / 3)
    assert ranks[2].seconds_on_links == pytest.approx(1000 / 1e9 * 2 / 3)
    load = traces.synthetic_load(2, 16)
    made = plan(load, cluster, 16)
    tokens = made.times() * [2, 2, 1]
    assert np.bincount(made.slot_rank)[2] < np.bincount(made.slot_rank)[0] and (tokens[:, 0] > tokens[:, 2]).all()
    assert "memory was not looked at" in made.describe()
    assert "memory" not in plan(load, cluster, 16, bytes_per_expert=1000).describe()
    linked = plan(load, ranks, 16)
    assert (linked.ranks.cost > [0.5e-6, 0.5e-6, 1e-6]).all()
