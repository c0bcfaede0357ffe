"""The fast solver's inner loops, one layer at a time. Arrays in and out; no classes, no checks.

Names: `load_E` tokens per expert; of rank r: `cost[r]` seconds per token, `fixed[r]` seconds per active expert,
slots `first[r]` to `first[r + 1]`. `expert_S` is the expert a slot holds, `tokens_S` the tokens it takes. Every
function is deterministic: ties go to the lower rank, slot or expert.
"""

from __future__ import annotations

import numpy as np

from .jit import jit


@jit
def replicas_within(load_E, limit, cost, fixed, count):
    """The least replicas each expert needs when no rank may take longer than `limit`; 0 where no number does.

    Replicas of one expert are on different ranks, so m of them carry no more than the m widest ranks do. `cost`,
    `fixed` and `count` describe classes of equal ranks.
    """
    room = (limit - fixed) / cost
    order = np.argsort(-room)
    needed = np.zeros(len(load_E), np.int64)
    for e in range(len(load_E)):
        rest, replicas = load_E[e], 0
        if rest <= 0:
            needed[e] = 1
            continue
        for c in order:
            if room[c] <= 0:
                break
            wanted = int(np.ceil(rest / room[c]))
            if wanted <= count[c]:
                replicas += wanted
                rest = 0.0
                break
            replicas += count[c]
            rest -= room[c] * count[c]
        needed[e] = replicas if rest <= 0 else 0
    return needed


@jit
def may_be_reached(load_E, limit, cost, fixed, count, num_slots):
    """Whether the relaxation below allows `limit`; when it does not, no placement reaches it.

    Slots: the replicas each expert needs at least must fit. Volume: with that many active slots, in the ranks where
    an active slot costs least, the ranks' time together must hold all tokens.
    """
    needed = replicas_within(load_E, limit, cost, fixed, count)
    slots, active = 0, 0
    for e in range(len(load_E)):
        if needed[e] == 0:
            return False
        slots += needed[e]
        if load_E[e] > 0:
            active += needed[e]
    if slots > num_slots:
        return False
    volume = 0.0
    for c in range(len(cost)):
        volume += count[c] * limit / cost[c]
    lost = fixed / cost
    for c in np.argsort(lost):
        # A rank holds an expert at most once, so at most len(load_E) active slots.
        here = min(active, count[c] * len(load_E))
        volume -= here * lost[c]
        active -= here
    return volume >= load_E.sum() * (1 - 1e-12)


@jit
def lower_bound(load_E, cost, fixed, count, num_slots):
    """Seconds below which no placement of this layer can bring its slowest rank, by bisection on the relaxation."""
    total = load_E.sum()
    if total <= 0:
        return 0.0
    low, speed = 0.0, 0.0
    for c in range(len(cost)):
        speed += count[c] / cost[c]
    low = total / speed
    if may_be_reached(load_E, low, cost, fixed, count, num_slots):
        return low * (1 - 1e-12)
    high = low * 2
    while not may_be_reached(load_E, high, cost, fixed, count, num_slots):
        low, high = high, high * 2
    for _ in range(44):
        middle = 0.5 * (low + high)
        if may_be_reached(load_E, middle, cost, fixed, count, num_slots):
            high = middle
        else:
            low = middle
    return low * (1 - 1e-12)


@jit
def replicate(load_E, num_slots, num_ranks):
    """Replicas per expert [E]: one each, then one by one to the expert with the most tokens per replica.

    That is optimal for the most loaded replica (each step is forced). At most one replica per rank.
    """
    num_experts = len(load_E)
    copies = np.ones(num_experts, np.int64)
    # A heap of experts by tokens per replica, the larger first, ties to the lower expert.
    heap = np.argsort(-load_E, kind="mergesort")
    key = load_E.copy()
    for _ in range(num_slots - num_experts):
        top = heap[0]
        copies[top] += 1
        key[top] = load_E[top] / copies[top] if copies[top] < num_ranks else -1.0
        at = 0
        while True:
            child = 2 * at + 1
            if child >= num_experts:
                break
            right = child + 1
            if right < num_experts:
                ahead = key[heap[right]] - key[heap[child]]
                if ahead > 0 or (ahead == 0 and heap[right] < heap[child]):
                    child = right
            if key[heap[child]] > key[top] or (key[heap[child]] == key[top] and heap[child] < top):
                heap[at] = heap[child]
                at = child
            else:
                break
        heap[at] = top
    return copies


@jit
def pack(load_E, copies, cost, fixed, first):
    """Replicas to slots: the largest first, each to the rank that would then be done soonest (LPT).

    A rank takes no expert twice. A replica that finds only ranks holding its expert is left out, and its slot goes
    to the expert with the most tokens per replica among those its rank lacks. Returns expert_S.
    """
    num_experts, num_ranks = len(load_E), len(cost)
    expert_S = np.full(first[num_ranks], -1, np.int32)
    used = first[:num_ranks].copy()
    times = np.zeros(num_ranks)
    placed = np.zeros(num_experts, np.int64)
    last_of = np.full(num_ranks, -1, np.int64)
    for e in np.argsort(-(load_E / copies), kind="mergesort"):
        piece = load_E[e] / copies[e]
        for _ in range(copies[e]):
            best, soonest = -1, np.inf
            for r in range(num_ranks):
                # Replicas of one expert come one after the other, so the last expert tells all.
                if used[r] < first[r + 1] and last_of[r] != e:
                    done = times[r] + cost[r] * piece + fixed[r]
                    if done < soonest:
                        best, soonest = r, done
            if best < 0:
                break
            expert_S[used[best]] = e
            used[best] += 1
            last_of[best] = e
            times[best] = soonest
            placed[e] += 1
    for r in range(num_ranks):
        for s in range(used[r], first[r + 1]):
            expert_S[s] = spare_expert(expert_S, first[r], s, load_E, placed)
            placed[expert_S[s]] += 1
    return expert_S


@jit
def spare_expert(expert_S, start, stop, load_E, copies):
    """The expert with the most tokens per replica among those that slots start to stop do not hold."""
    best, most = -1, -1.0
    for e in range(len(load_E)):
        tokens = load_E[e] / copies[e]
        if tokens > most:
            held = False
            for s in range(start, stop):
                held = held or expert_S[s] == e
            if not held:
                best, most = e, tokens
    return best


@jit
def equal_tokens(expert_S, load_E):
    """Tokens per slot when replicas share equally."""
    copies = np.zeros(len(load_E), np.int64)
    for e in expert_S:
        copies[e] += 1
    tokens_S = np.empty(len(expert_S))
    for s in range(len(expert_S)):
        tokens_S[s] = load_E[expert_S[s]] / copies[expert_S[s]]
    return tokens_S


@jit
def slots_by_expert(expert_S, num_experts):
    """(slots sorted by expert [S], where each expert's begin [E + 1])."""
    begin = np.zeros(num_experts + 1, np.int64)
    for e in expert_S:
        begin[e + 1] += 1
    for e in range(num_experts):
        begin[e + 1] += begin[e]
    at = begin[:num_experts].copy()
    slots = np.empty(len(expert_S), np.int64)
    for s in range(len(expert_S)):
        slots[at[expert_S[s]]] = s
        at[expert_S[s]] += 1
    return slots, begin


@jit
def split_tokens(expert_S, rank_S, load_E, cost, fixed, tokens_S, sweeps, tolerance):
    """Tokens per slot [S] that bring the slowest rank's time down, for a placement that stands.

    Expert by expert, its tokens are poured over its replicas like water, the ranks' other work being the ground;
    again and again until the slowest rank gains less than `tolerance` in a sweep, or `sweeps` are done. Each pouring
    lowers the sum of time^2 / cost, which is convex, and its minimum also minimises the slowest rank (Fujishige 1980,
    lexicographically optimal bases). `tokens_S` is where to begin; it is overwritten.
    """
    num_experts, num_ranks = len(load_E), len(cost)
    slots, begin = slots_by_expert(expert_S, num_experts)
    times = np.zeros(num_ranks)
    for s in range(len(expert_S)):
        if load_E[expert_S[s]] > 0:
            times[rank_S[s]] += cost[rank_S[s]] * tokens_S[s] + fixed[rank_S[s]]
    slowest = times.max()
    two_up, two_down = np.array([0, 1]), np.array([1, 0])
    for _ in range(sweeps):
        for e in range(num_experts):
            num = begin[e + 1] - begin[e]
            if num < 2 or load_E[e] <= 0:
                continue
            mine = slots[begin[e] : begin[e + 1]]
            ground = np.empty(num)
            for i in range(num):
                r = rank_S[mine[i]]
                ground[i] = times[r] - cost[r] * tokens_S[mine[i]]
            if num == 2:
                order = two_up if ground[0] <= ground[1] else two_down
            else:
                order = np.argsort(ground, kind="mergesort")
            # Water level: with the i lowest flooded, level = (load + sum ground / cost) / sum 1 / cost.
            weight, above, level = 0.0, load_E[e], 0.0
            for i in range(num):
                if i and ground[order[i]] >= level:
                    break
                c = cost[rank_S[mine[order[i]]]]
                weight += 1.0 / c
                above += ground[order[i]] / c
                level = above / weight
            for i in range(num):
                s = mine[i]
                r = rank_S[s]
                tokens_S[s] = max(0.0, (level - ground[i]) / cost[r])
                times[r] = ground[i] + cost[r] * tokens_S[s]
        now = times.max()
        if now >= slowest * (1 - tolerance):
            break
        slowest = now
    return tokens_S


@jit
def swap_improve(expert_S, tokens_S, cost, fixed, first, target, steps):
    """Swap slots between the slowest rank and others while that makes the slower of the two faster. In place.

    Tokens stay with their replica. Stops at `target` seconds, when no swap helps, or after `steps`.
    """
    num_ranks = len(cost)
    times = np.zeros(num_ranks)
    for r in range(num_ranks):
        for s in range(first[r], first[r + 1]):
            times[r] += cost[r] * tokens_S[s] + (fixed[r] if tokens_S[s] > 0 else 0.0)
    for _ in range(steps):
        a = np.argmax(times)
        if times[a] <= target:
            break
        best, best_i, best_j, best_b = times[a] * (1 - 1e-9), -1, -1, -1
        for b in range(num_ranks):
            # Even the ideal swap would leave both at this time.
            if b == a or (times[a] * cost[b] + times[b] * cost[a]) / (cost[a] + cost[b]) >= best:
                continue
            for i in range(first[a], first[a + 1]):
                for j in range(first[b], first[b + 1]):
                    moved = tokens_S[i] - tokens_S[j]
                    if moved <= 0:
                        continue
                    worse = max(times[a] - cost[a] * moved, times[b] + cost[b] * moved)
                    if tokens_S[j] <= 0:
                        worse = max(times[a] - cost[a] * moved - fixed[a], times[b] + cost[b] * moved + fixed[b])
                    if (
                        worse < best
                        and not _holds(expert_S, first, a, expert_S[j])
                        and not _holds(expert_S, first, b, expert_S[i])
                    ):
                        best, best_i, best_j, best_b = worse, i, j, b
        if best_i < 0:
            break
        moved = tokens_S[best_i] - tokens_S[best_j]
        times[a] -= cost[a] * moved
        times[best_b] += cost[best_b] * moved
        if tokens_S[best_j] <= 0:
            times[a] -= fixed[a]
            times[best_b] += fixed[best_b]
        expert_S[best_i], expert_S[best_j] = expert_S[best_j], expert_S[best_i]
        tokens_S[best_i], tokens_S[best_j] = tokens_S[best_j], tokens_S[best_i]
    return times.max()


@jit
def _holds(expert_S, first, rank, expert):
    for s in range(first[rank], first[rank + 1]):
        if expert_S[s] == expert:
            return True
    return False


@jit
def spread(load_E, copies, cost, fixed, first, target, equal):
    """One layer from replica counts: packed, swapped, and (unless `equal`) its shares poured out, in turns.

    Returns (expert_S, tokens_S).
    """
    rank_S = np.empty(first[len(cost)], np.int32)
    for r in range(len(cost)):
        rank_S[first[r] : first[r + 1]] = r
    expert_S = pack(load_E, copies, cost, fixed, first)
    tokens_S = equal_tokens(expert_S, load_E)
    best = swap_improve(expert_S, tokens_S, cost, fixed, first, target, 400)
    if equal:
        return expert_S, tokens_S
    best_expert, best_tokens = expert_S.copy(), tokens_S.copy()
    for _ in range(3):
        if best <= target:
            break
        split_tokens(expert_S, rank_S, load_E, cost, fixed, tokens_S, 16, 1e-4)
        now = swap_improve(expert_S, tokens_S, cost, fixed, first, target, 100)
        if now >= best:
            break
        done = now > best * (1 - 2e-4)
        best = now
        best_expert[:], best_tokens[:] = expert_S, tokens_S
        if done:
            break
    return best_expert, best_tokens


@jit
def shares_of(expert_S, tokens_S, num_experts):
    """Each slot's part of its expert's tokens [S]; equal parts for an expert without tokens."""
    total, copies = np.zeros(num_experts), np.zeros(num_experts)
    for s in range(len(expert_S)):
        total[expert_S[s]] += tokens_S[s]
        copies[expert_S[s]] += 1
    share_S = np.empty(len(expert_S))
    for s in range(len(expert_S)):
        e = expert_S[s]
        share_S[s] = tokens_S[s] / total[e] if total[e] > 0 else 1.0 / copies[e]
    return share_S


@jit
def fill_spare(expert_S, load_E, first):
    """Gives each unused slot (-1) the expert with the most tokens per replica among those its rank lacks. In place."""
    copies = np.zeros(len(load_E))
    for e in expert_S:
        if e >= 0:
            copies[e] += 1
    for r in range(len(first) - 1):
        for s in range(first[r], first[r + 1]):
            if expert_S[s] < 0:
                expert_S[s] = spare_expert(expert_S, first[r], first[r + 1], load_E, copies)
                copies[expert_S[s]] += 1
