"""L3: moe-launch, its engines, and the training and inference jobs."""

if __name__ != "moe_runtime.launch":
    raise ImportError(
        "this folder is moe_runtime.launch; install the repository (pip install -e .) and import moe_runtime.launch"
    )
