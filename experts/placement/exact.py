"""The exact solver: one mixed-integer program per layer, solved by HiGHS through scipy. For small layers.

Variables: y[e, r] whether rank r holds expert e, x[e, r] the tokens it takes, T the slowest rank's time. Minimise T:
every expert's tokens are taken, x <= load * y, at most slots[r] experts on rank r, and on every rank
cost * tokens + fixed * active experts <= T.
"""

from __future__ import annotations

import numpy as np

from ...core.errors import ConfigError
from . import kernels
from .model import Ranks


def solve_layer(load_E: np.ndarray, ranks: Ranks, time_limit: float) -> tuple[np.ndarray, np.ndarray, float]:
    """(expert_S, tokens_S, proven bound in seconds). Raises ConfigError when no placement was found in time."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array, eye_array, hstack, kron
    except ImportError:
        raise ConfigError('plan: the "exact" policy needs scipy; install moe-runtime[research]') from None
    num_experts, num_ranks, total = len(load_E), ranks.count, load_E.sum()
    scale = total if total > 0 else 1.0
    load = load_E / scale
    pairs = num_experts * num_ranks
    of_expert = kron(eye_array(num_experts), np.ones((1, num_ranks)), "csr")  # [E, E R]
    of_rank = kron(np.ones((1, num_experts)), eye_array(num_ranks), "csr")  # [R, E R]
    none_EP, none_RP = coo_array((num_experts, pairs)), coo_array((num_ranks, pairs))
    no_time_E, no_time_P = coo_array((num_experts, 1)), coo_array((pairs, 1))
    price = ranks.cost.mean()
    used = eye_array(num_ranks).multiply(ranks.fixed / (price * scale)) @ of_rank
    work = eye_array(num_ranks).multiply(ranks.cost / price) @ of_rank
    per_pair = eye_array(pairs).multiply(np.repeat(load, num_ranks))
    constraints = [
        LinearConstraint(hstack([of_expert, none_EP, no_time_E]), load, load),
        LinearConstraint(hstack([none_EP, of_expert, no_time_E]), 1, num_ranks),
        LinearConstraint(hstack([none_RP, of_rank, coo_array((num_ranks, 1))]), 0, ranks.slots),
        LinearConstraint(hstack([eye_array(pairs), -per_pair, no_time_P]), -np.inf, 0),
        LinearConstraint(hstack([work, used, coo_array(-np.ones((num_ranks, 1)))]), -np.inf, 0),
    ]
    found = milp(
        np.concatenate([np.zeros(2 * pairs), [1.0]]),
        integrality=np.concatenate([np.zeros(pairs), np.ones(pairs), [0]]),
        bounds=Bounds(0, np.concatenate([np.full(pairs, np.inf), np.ones(pairs), [np.inf]])),
        constraints=constraints,
        options={"time_limit": time_limit, "mip_rel_gap": 1e-6},
    )
    if found.x is None:
        raise ConfigError(
            f"plan: HiGHS found no placement within {time_limit:g} s; give a longer time_limit, or use policy fast"
        )
    bound = float(found.mip_dual_bound) * scale * price if found.mip_dual_bound is not None else 0.0
    held = found.x[pairs:-1].reshape(num_experts, num_ranks) > 0.5
    tokens = found.x[:pairs].reshape(num_experts, num_ranks) * scale
    expert_S, tokens_S = np.full(ranks.num_slots, -1, np.int32), np.zeros(ranks.num_slots)
    for rank in range(num_ranks):
        mine = np.flatnonzero(held[:, rank])
        at = ranks.first[rank] + np.arange(len(mine))
        expert_S[at], tokens_S[at] = mine, np.maximum(tokens[mine, rank], 0)
    kernels.fill_spare(expert_S, load_E, ranks.first)
    return expert_S, tokens_S, bound
