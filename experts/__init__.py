"""L1: what happens at a rank that holds experts: placement, replica choice, grouped compute, traces."""

if __name__ != "moe_runtime.experts":
    raise ImportError(
        "this folder is moe_runtime.experts; install the repository (pip install -e .) and import moe_runtime.experts"
    )
