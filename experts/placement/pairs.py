"""Ranks of two slots and one speed: the bound that holds there, and the construction that comes near it.

With two slots a rank, cut the placement where tokens allow it until no cycle of experts and ranks is left. It falls
into groups, and a group of n experts needs at least n - 1 ranks. E experts on R ranks with S slots make at least
E + R - S groups that have just n - 1 ranks. Such a group can be done in T seconds only if its tokens fit,
sum(load) <= (n - 1) T, that is sum(1 - load / T) >= 1: covering bins of size 1 with items of size 1 - load / T. (Any
star obeying that can be done: the largest expert has a replica on every rank, the others one each.)
"""

from __future__ import annotations

import numpy as np

from .jit import jit


@jit
def cover_bound(load_E, num_ranks, num_slots, low, multipliers):
    """Tokens per rank below which the groups above cannot exist; at least `low`.

    If sizes w of a group sum to 1 or more, then so do G(c w) / ceil(c) for every c > 1 that is not whole, where
    G(d) = floor(d) + min(1, frac(d) / frac(c)): Gomory's mixed-integer rounding (Nemhauser and Wolsey, 1990), which
    is subadditive. Hence a T at which the G of all experts add up to less than the number of groups is too small.
    Every c gives a valid bound; the best of `multipliers` is returned.
    """
    groups = len(load_E) + num_ranks - num_slots
    best = low
    if groups <= 0 or best <= 0:
        return best
    for c in multipliers:
        fraction = c - np.floor(c)
        high, bottom, first = best * 1.5, best, True
        for _ in range(26):
            limit = bottom * (1 + 1e-9) if first else 0.5 * (bottom + high)
            covered = 0.0
            for e in range(len(load_E)):
                d = c * (1.0 - load_E[e] / limit) + 1e-9
                whole = np.floor(d)
                covered += whole + min(1.0, (d - whole) / fraction)
            possible = covered >= groups * (np.floor(c) + 1) - 1e-6
            if first and possible:
                break
            first = False
            if possible:
                high = limit
            else:
                bottom = limit
        best = max(best, bottom)
    return best


@jit
def make_groups(load_E, order, limit, num_ranks, lean, group_E):
    """Groups of experts that stars can serve within `limit` tokens a rank; how many, or -1 when ranks do not suffice.

    The largest expert left takes the fewest companions whose smallest choice fits. A hot one (more than `limit`)
    takes companions of about equal size, because the smallest are what nearly full experts need (`lean`, 0 to 1,
    leans to the other rule); any other takes the largest that leave room for the rest. `order` sorts the load,
    ascending; `group_E` is written.
    """
    waiting = order.copy()
    rest = load_E[waiting]
    n, used, groups = len(waiting), 0, 0
    while n > 0:
        n -= 1
        need = rest[n]
        group_E[waiting[n]] = groups
        if n == 0 or need > num_ranks * limit:
            used += max(1, int(np.ceil(need / limit)))
            groups += 1
            continue
        leaves, smallest = 1, rest[0]
        while smallest > leaves * limit - need and leaves < n:
            smallest += rest[leaves]
            leaves += 1
        if smallest > leaves * limit - need:
            return -1
        hot = need >= limit
        used += leaves
        while leaves > 0:
            room = leaves * limit - need
            most = room
            for i in range(leaves - 1):
                most -= rest[i]
            if hot:
                most = lean * most + (1 - lean) * room / leaves
            at = max(0, np.searchsorted(rest[:n], min(most, limit), "right") - 1)
            group_E[waiting[at]] = groups
            need += rest[at] - limit
            for i in range(at, n - 1):
                rest[i], waiting[i] = rest[i + 1], waiting[i + 1]
            n -= 1
            leaves -= 1
        groups += 1
    return groups if used <= num_ranks else -1


@jit
def swap_groups(load_E, group_E, num_groups, target, steps):
    """Swap experts between the slowest group and others while both end below its time; returns the slowest's."""
    num_experts = len(load_E)
    total, ranks = np.zeros(num_groups), np.full(num_groups, -1.0)
    for e in range(num_experts):
        total[group_E[e]] += load_E[e]
        ranks[group_E[e]] += 1
    ranks = np.maximum(ranks, 1.0)
    times = total / ranks
    for _ in range(steps):
        g = np.argmax(times)
        best, best_i, best_j = times[g] * (1 - 1e-9), -1, -1
        if best <= target:
            break
        for i in range(num_experts):
            if group_E[i] != g:
                continue
            for j in range(num_experts):
                h, moved = group_E[j], load_E[i] - load_E[j]
                if h == g or total[g] - moved >= best * ranks[g] or total[h] + moved >= best * ranks[h]:
                    continue
                worse = max((total[g] - moved) / ranks[g], (total[h] + moved) / ranks[h])
                # All but the largest of h are held whole by one rank.
                too_large = 1 if load_E[i] > worse else 0
                for q in range(num_experts):
                    if group_E[q] == h and q != j and load_E[q] > worse:
                        too_large += 1
                if too_large <= 1 and worse < best:
                    best, best_i, best_j = worse, i, j
        if best_i < 0:
            break
        h, moved = group_E[best_j], load_E[best_i] - load_E[best_j]
        total[g] -= moved
        total[h] += moved
        times[g], times[h] = total[g] / ranks[g], total[h] / ranks[h]
        group_E[best_i], group_E[best_j] = h, g
    return times.max()


@jit
def stars(load_E, group_E, num_groups, num_ranks):
    """Slots [2 R] of the groups' stars: (expert_S with -1 for an unused slot, tokens_S, whether all fitted)."""
    expert_S, tokens_S = np.full(2 * num_ranks, -1, np.int32), np.zeros(2 * num_ranks)
    r, at = 0, 0
    sorted_E = np.argsort(group_E, kind="mergesort")
    for g in range(num_groups):
        begin = at
        while at < len(sorted_E) and group_E[sorted_E[at]] == g:
            at += 1
        members = sorted_E[begin:at]
        centre = members[np.argmax(load_E[members])]
        ranks = max(1, len(members) - 1)
        if r + ranks > num_ranks:
            return expert_S, tokens_S, False
        for e in members:
            if e != centre:
                expert_S[2 * r], expert_S[2 * r + 1] = e, centre
                tokens_S[2 * r], tokens_S[2 * r + 1] = load_E[e], load_E[centre] / ranks
                r += 1
        if len(members) == 1:
            expert_S[2 * r], tokens_S[2 * r] = centre, load_E[centre]
            r += 1
    return expert_S, tokens_S, True


@jit
def solve_pairs(load_E, low, high, num_ranks):
    """A layer on ranks of two slots and equal speed: (expert_S, tokens_S, found one), between two times per rank.

    Groups by bisection on the time, swaps, for two ways to choose a hot expert's companions; the better is kept.
    """
    order = np.argsort(load_E, kind="mergesort")
    group_E, found_E, best_E = np.zeros(len(load_E), np.int64), order.copy(), order.copy()
    best, best_groups = np.inf, -1
    for lean in (0.0, 0.2):
        bottom, top, groups = low, high, -1
        limit = min(low * 1.06, best * 1.002)
        for _ in range(7):
            made = make_groups(load_E, order, limit, num_ranks, lean, group_E)
            if made >= 0:
                groups, top = made, limit
                found_E[:] = group_E
            else:
                bottom = limit
            if top - bottom < 0.006 * low:
                break
            limit = 0.5 * (bottom + top) if groups >= 0 else min(top, limit * 1.03)
        if groups < 0:
            continue
        slowest = swap_groups(load_E, found_E, groups, low, 300)
        if slowest < best:
            best, best_groups = slowest, groups
            best_E[:] = found_E
    if best_groups < 0:
        return np.zeros(0, np.int32), np.zeros(0), False
    return stars(load_E, best_E, best_groups, num_ranks)
