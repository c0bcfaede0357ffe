"""Choosing where experts live: which expert each slot of each rank holds, and each replica's share of its tokens.

`plan` is the planner; `proportional` the placement of a run that has no load yet. Nothing here needs numba or scipy
until it plans.
"""

from .eplb import rebalance_experts
from .files import export_sglang, export_vllm, export_vllm_ascend, load_plan, save_plan
from .model import Rank, ranks_of_cluster
from .owners import Placement, apportion, from_owners, proportional
from .planner import Plan, engine, plan, split

__all__ = [
    "Placement",
    "Plan",
    "Rank",
    "apportion",
    "engine",
    "export_sglang",
    "export_vllm",
    "export_vllm_ascend",
    "from_owners",
    "load_plan",
    "plan",
    "proportional",
    "ranks_of_cluster",
    "rebalance_experts",
    "save_plan",
    "split",
]
