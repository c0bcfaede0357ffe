"""Placement that keeps a token's experts on few nodes: experts to nodes by what tokens select together, then to ranks.

An expert and its replicas stay on one node, so the nodes that a token visits follow from its experts alone. What is
minimised is visits, (token, node) pairs; the nodes' loads are kept near their part of the speed.
"""

from __future__ import annotations

import numpy as np

from .jit import jit


@jit
def assign(load_E, member_TE, token_E, begin_E, home_E, visit_cost, load_cap, slot_cap, passes):
    """Improves home_E (expert to node) in place by moves and swaps; returns the weighted visits left.

    member_TE: whether a token selects an expert; token_E[begin_E[e]:begin_E[e + 1]] are the tokens that select e.
    visit_cost [N]: price of a token's visit to a node. load_cap, slot_cap [N]: tokens and experts a node may have; a
    node that has more comes first: as long as the excess over load_cap falls, visits may rise.
    """
    num_tokens, num_experts = member_TE.shape
    num_nodes = len(visit_cost)
    seen = np.zeros((num_tokens, num_nodes), np.int32)
    load_N, held_N = np.zeros(num_nodes), np.zeros(num_nodes, np.int64)
    for e in range(num_experts):
        load_N[home_E[e]] += load_E[e]
        held_N[home_E[e]] += 1
        for at in range(begin_E[e], begin_E[e + 1]):
            seen[token_E[at], home_E[e]] += 1
    for _ in range(passes):
        changed = False
        for e in range(num_experts):
            n = home_E[e]
            best, best_f, best_m = -1e-9, -1, -1
            # f = num_experts + m means a move of e alone to node m.
            for f in range(num_experts + num_nodes):
                alone = f >= num_experts
                m = f - num_experts if alone else home_E[f]
                if m == n or (not alone and f < e) or (alone and held_N[m] >= slot_cap[m]):
                    continue
                moved = load_E[e] - (0.0 if alone else load_E[f])
                excess = max(0.0, load_N[n] - load_cap[n]) + max(0.0, load_N[m] - load_cap[m])
                then = max(0.0, load_N[n] - moved - load_cap[n]) + max(0.0, load_N[m] + moved - load_cap[m])
                if then > excess * (1 + 1e-12) and then > 1e-9:
                    continue
                delta = (then - excess) * 1e-3 if then < excess else 0.0
                relief = excess - then
                visits = 0.0
                for at in range(begin_E[e], begin_E[e + 1]):
                    t = token_E[at]
                    if alone or not member_TE[t, f]:
                        visits += (visit_cost[m] if seen[t, m] == 0 else 0.0) - (
                            visit_cost[n] if seen[t, n] == 1 else 0.0
                        )
                if not alone:
                    for at in range(begin_E[f], begin_E[f + 1]):
                        t = token_E[at]
                        if not member_TE[t, e]:
                            visits += (visit_cost[n] if seen[t, n] == 0 else 0.0) - (
                                visit_cost[m] if seen[t, m] == 1 else 0.0
                            )
                # Where a node is over its part, price a visit against the tokens it is relieved of.
                delta = visits - 10.0 * relief
                if delta < best:
                    best, best_f, best_m = delta, f, m
            if best_f < 0:
                continue
            changed = True
            alone = best_f >= num_experts
            for step in range(1 if alone else 2):
                x, source, target = (e, n, best_m) if step == 0 else (best_f, best_m, n)
                home_E[x] = target
                load_N[source] -= load_E[x]
                load_N[target] += load_E[x]
                held_N[source] -= 1
                held_N[target] += 1
                for at in range(begin_E[x], begin_E[x + 1]):
                    seen[token_E[at], source] -= 1
                    seen[token_E[at], target] += 1
        if not changed:
            break
    total = 0.0
    for t in range(num_tokens):
        for n in range(num_nodes):
            if seen[t, n] > 0:
                total += visit_cost[n]
    return total


def first_homes(load_E: np.ndarray, group_E: np.ndarray, part_N: np.ndarray, slot_cap: np.ndarray) -> np.ndarray:
    """Whole groups to nodes, the largest first to the node that is least full for its part; [E]."""
    home_E, load_N, held_N = np.zeros(len(load_E), np.int64), np.zeros(len(part_N)), np.zeros(len(part_N), np.int64)
    groups = [np.flatnonzero(group_E == group) for group in np.unique(group_E)]
    for experts in sorted(groups, key=lambda experts: (-load_E[experts].sum(), experts[0])):
        room = held_N + len(experts) <= slot_cap
        if room.any():
            node = int(np.argmin(np.where(room, (load_N + load_E[experts].sum()) / part_N, np.inf)))
            home_E[experts] = node
            load_N[node] += load_E[experts].sum()
            held_N[node] += len(experts)
            continue
        for expert in experts:  # no node has room for the whole group
            node = int(np.argmin(np.where(held_N < slot_cap, load_N / part_N, np.inf)))
            home_E[expert] = node
            load_N[node] += load_E[expert]
            held_N[node] += 1
    return home_E


def internode_tokens(slot_node: np.ndarray, replica_TK: np.ndarray, num_nodes: int, node_part: np.ndarray) -> float:
    """Crossings per token of one layer: nodes a token visits besides the one it is on.

    slot_node [S]; replica_TK: the slot each token's selection goes to, -1 for none. Tokens begin on node n with
    probability node_part[n], whatever they select, so visiting n crosses with probability 1 - node_part[n].
    """
    visited = np.zeros((len(replica_TK), num_nodes), bool)
    tokens, columns = np.nonzero(replica_TK >= 0)
    visited[tokens, slot_node[replica_TK[tokens, columns]]] = True
    return float((visited * (1 - node_part)).sum() / max(1, len(replica_TK)))


def replicas_taken(topk_ids_TK: np.ndarray, slot_expert_S: np.ndarray, slot_share_S: np.ndarray) -> np.ndarray:
    """The slot each selection goes to [T, K], -1 for none, replicas taken by their shares.

    As the runtime's ReplicaChooser does: token i takes the replica that the i-th multiple of the golden ratio,
    modulo 1, falls on.
    """
    slots = np.argsort(slot_expert_S, kind="stable")
    begin = np.searchsorted(slot_expert_S[slots], np.arange(slot_expert_S.max() + 2))
    ends = np.cumsum(slot_share_S[slots])
    ends -= np.concatenate([[0.0], ends])[begin[slot_expert_S[slots]]]
    # Slots sorted by (expert, end of share): one search for expert + point finds the replica.
    point = (np.arange(len(topk_ids_TK)) * 0.6180339887498949) % 1.0
    keys = slot_expert_S[slots] + np.minimum(ends, 1.0)
    at = np.searchsorted(keys, topk_ids_TK + point[:, None], "right")
    ids = np.maximum(topk_ids_TK, 0)
    at = np.clip(at, begin[ids], begin[ids + 1] - 1)
    return np.where(topk_ids_TK >= 0, slots[at], -1)
