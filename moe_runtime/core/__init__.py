"""L0: errors, environment, configuration, placement and routing types.

Pure: nothing here imports torch.distributed, comm, experts or launch.
"""
