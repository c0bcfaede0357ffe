"""Local search beyond one load: over several workloads at once, and from a placement that stands."""

from __future__ import annotations

import numpy as np

from .jit import jit


@jit
def replicate_many(load_WE, num_slots, num_ranks):
    """Replicas per expert [E]: one by one to the expert whose replicas carry the most in any workload."""
    peak = np.zeros(load_WE.shape[1])
    for w in range(load_WE.shape[0]):
        peak = np.maximum(peak, load_WE[w])
    copies = np.ones(len(peak), np.int64)
    key = peak.copy()
    for _ in range(num_slots - len(peak)):
        e = np.argmax(key)
        copies[e] += 1
        key[e] = peak[e] / copies[e] if copies[e] < num_ranks else -1.0
    return copies


@jit
def pack_many(load_WE, copies, cost, first):
    """Replicas to slots, the largest (in any workload) first, each where the slowest workload ends soonest.

    A replica that finds only ranks holding its expert is left out: its slot stays -1.
    """
    workloads, num_experts = load_WE.shape
    num_ranks = len(cost)
    expert_S = np.full(first[num_ranks], -1, np.int32)
    used = first[:num_ranks].copy()
    last_of = np.full(num_ranks, -1, np.int64)
    times = np.zeros((num_ranks, workloads))
    peak = np.zeros(num_experts)
    for e in range(num_experts):
        peak[e] = load_WE[:, e].max() / copies[e]
    for e in np.argsort(-peak, kind="mergesort"):
        for _ in range(copies[e]):
            best, soonest, sum_there = -1, np.inf, np.inf
            for r in range(num_ranks):
                if used[r] >= first[r + 1] or last_of[r] == e:
                    continue
                done, total = 0.0, 0.0
                for w in range(workloads):
                    then = times[r, w] + cost[r] * load_WE[w, e] / copies[e]
                    done = max(done, then)
                    total += then
                if done < soonest or (done == soonest and total < sum_there):
                    best, soonest, sum_there = r, done, total
            if best < 0:
                break
            expert_S[used[best]] = e
            used[best] += 1
            last_of[best] = e
            for w in range(workloads):
                times[best, w] += cost[best] * load_WE[w, e] / copies[e]
    return expert_S


@jit
def swap_many(expert_S, load_WE, cost, first, steps):
    """Swap slots while that lowers the slowest rank of the worst workload; equal shares. In place, returns it."""
    workloads, num_ranks = load_WE.shape[0], len(cost)
    copies = np.zeros(load_WE.shape[1])
    for e in expert_S:
        copies[e] += 1
    times = np.zeros((num_ranks, workloads))
    piece = np.empty((len(expert_S), workloads))
    for r in range(num_ranks):
        for s in range(first[r], first[r + 1]):
            for w in range(workloads):
                piece[s, w] = load_WE[w, expert_S[s]] / copies[expert_S[s]]
                times[r, w] += cost[r] * piece[s, w]
    for _ in range(steps):
        flat = np.argmax(times)
        a, w_worst = flat // workloads, flat % workloads
        best, best_i, best_j, best_b = times[a, w_worst] * (1 - 1e-9), -1, -1, -1
        for i in range(first[a], first[a + 1]):
            for b in range(num_ranks):
                if b == a:
                    continue
                for j in range(first[b], first[b + 1]):
                    if piece[i, w_worst] <= piece[j, w_worst]:
                        continue
                    worse = 0.0
                    for w in range(workloads):
                        moved = piece[i, w] - piece[j, w]
                        worse = max(worse, times[a, w] - cost[a] * moved, times[b, w] + cost[b] * moved)
                        if worse >= best:
                            break
                    if worse >= best:
                        continue
                    twice = False
                    for s in range(first[a], first[a + 1]):
                        twice = twice or expert_S[s] == expert_S[j]
                    for s in range(first[b], first[b + 1]):
                        twice = twice or expert_S[s] == expert_S[i]
                    if not twice:
                        best, best_i, best_j, best_b = worse, i, j, b
        if best_i < 0:
            break
        for w in range(workloads):
            moved = piece[best_i, w] - piece[best_j, w]
            times[a, w] -= cost[a] * moved
            times[best_b, w] += cost[best_b] * moved
            kept = piece[best_i, w]
            piece[best_i, w] = piece[best_j, w]
            piece[best_j, w] = kept
        expert_S[best_i], expert_S[best_j] = expert_S[best_j], expert_S[best_i]
    return times.max()


@jit
def next_step(expert_S, tokens_S, rank_S, num_experts, cost, first):
    """The step that helps the slowest rank a most: (kind, i, j), i a slot of a and j a slot of another rank b.

    kind 2: swap the experts of i and j (two moves). kind 1: j, whose expert has another replica, becomes a replica of
    i's expert (one move): j's tokens go to the least busy replica left, and a and b share i's tokens. kind 0: none
    helps. Per-expert costs are left out here; whoever calls prices the result.
    """
    num_ranks = len(cost)
    times, copies = np.zeros(num_ranks), np.zeros(num_experts, np.int64)
    for s in range(len(expert_S)):
        times[rank_S[s]] += cost[rank_S[s]] * tokens_S[s]
        copies[expert_S[s]] += 1
    holds = np.zeros((num_experts, num_ranks), np.bool_)
    for s in range(len(expert_S)):
        holds[expert_S[s], rank_S[s]] = True
    a = np.argmax(times)
    best, kind, best_i, best_j = times[a] * (1 - 1e-6), 0, -1, -1
    for j in range(len(expert_S)):
        b, f = rank_S[j], expert_S[j]
        if b == a:
            continue
        for i in range(first[a], first[a + 1]):
            e = expert_S[i]
            if holds[e, b]:
                continue
            if not holds[f, a]:
                moved = tokens_S[i] - tokens_S[j]
                worse = max(times[a] - cost[a] * moved, times[b] + cost[b] * moved)
                if worse < best:
                    best, kind, best_i, best_j = worse, 2, i, j
            if copies[f] > 1:
                free = times[b] - cost[b] * tokens_S[j]
                shifted = min(tokens_S[i], max(0.0, (times[a] - free) / (cost[a] + cost[b])))
                worse = max(times[a] - cost[a] * shifted, free + cost[b] * shifted)
                if worse < best:
                    elsewhere = np.inf
                    for r in range(num_ranks):
                        if r != b and holds[f, r]:
                            elsewhere = min(elsewhere, times[r] + cost[r] * tokens_S[j])
                    worse = max(worse, elsewhere)
                    if worse < best:
                        best, kind, best_i, best_j = worse, 1, i, j
    return kind, best_i, best_j
