"""The runtime's own settings, validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError

KERNELS = ("auto", "grouped", "transformers")
TRANSPORTS = ("auto", "gloo", "shm", "mpi", "zeromq", "islands")


@dataclass(frozen=True)
class RuntimeConfig:
    """Settings of `moe_runtime.init`.

    cluster: path of a cluster file; its nodes' speeds decide how many experts each rank holds. None: equal shares.
    timeout_s: deadline of every wait for another rank, in seconds.
    device: "cpu" (others come with the vendor table).
    transport: "gloo" (one torch.distributed group), "shm" (shared memory of one machine), "mpi" (under mpirun),
        "zeromq" (no torch.distributed: for nodes whose torch differs), "islands" (a group inside each vendor's island,
        ZeroMQ between them), or "auto": islands where the cluster file names more than one vendor, else gloo.
    per_expert_sums: send one row per (token, expert) home instead of one partial sum per (token, rank). Slower, but
        the result then does not depend on the placement, to the last bit.
    expert_kernel: "grouped" (ours), "transformers" (its registered experts function), or "auto" (ours on CPU).
    """

    cluster: str | None = None
    timeout_s: float = 300.0
    device: str = "cpu"
    transport: str = "auto"
    per_expert_sums: bool = False
    expert_kernel: str = "auto"

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s must be positive, got {self.timeout_s!r}")
        if self.device != "cpu":
            raise ConfigError(f"device {self.device!r}: only 'cpu' is supported so far")
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"transport must be one of {', '.join(TRANSPORTS)}, got {self.transport!r}")
        if self.expert_kernel not in KERNELS:
            raise ConfigError(f"expert_kernel must be one of {', '.join(KERNELS)}, got {self.expert_kernel!r}")

    @classmethod
    def from_any(cls, config: RuntimeConfig | Mapping[str, Any] | None) -> RuntimeConfig:
        """From None (defaults), a mapping, or a RuntimeConfig. Unknown keys raise ConfigError."""
        if isinstance(config, RuntimeConfig):
            return config
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(config or {}) - known)
        if unknown:
            raise ConfigError(f"unknown runtime setting {unknown[0]!r}; known settings: {', '.join(sorted(known))}")
        return cls(**(config or {}))
