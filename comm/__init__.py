"""L1: moving rows between ranks: transports, the dispatch plan, dispatch and combine."""

if __name__ != "moe_runtime.comm":
    raise ImportError(
        "this folder is moe_runtime.comm, not the PyPI package `comm`; "
        "install the repository (pip install -e .) and run from another directory"
    )
