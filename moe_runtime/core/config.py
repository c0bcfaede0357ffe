"""The runtime's own settings, validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError

KERNELS = ("auto", "grouped", "transformers")
DENSE_KERNELS = ("auto", "torch")
REPLICA_CHOICES = ("static", "local", "balanced")
BRIDGES = ("zeromq", "gloo", "mpi", "flagcx")
TRANSPORTS = ("auto", "gloo", "shm", "mpi", "zeromq", "islands")


@dataclass(frozen=True)
class RuntimeConfig:
    """Settings of `moe_runtime.init`.

    cluster: path of a cluster file; its nodes' speeds decide how many experts each rank holds. None: equal shares.
    timeout_s: deadline of every wait for another rank, in seconds.
    device: "auto" (the device that detection finds, or the one that the cluster file emulates), "cpu", or a device type
        of torch such as "cuda" that must be there.
    transport: "gloo" (one torch.distributed group, host memory), "shm" (shared memory of one machine), "mpi" (under
        mpirun), "zeromq" (no torch.distributed: for nodes whose torch differs), "islands" (a group inside each vendor's
        island, ZeroMQ between them), or "auto": islands where the cluster file names more than one vendor; else
        shared memory where all ranks are CPUs of one machine; else one group over the vendor's own library (gloo on
        CPUs).
    bridge: what joins islands: "zeromq", or "gloo" or "mpi" where all nodes have the same one, or "flagcx" where its
        torch plug-in is installed and every rank has a device.
    bridge_encryption: "off", or "on": rows between islands (and of transport "zeromq") are encrypted too, at a third
        to a half of the bandwidth (docs/transports.md); ranks then need a secret, which moe-launch hands them. It says
        nothing of rows inside an island.
    wire_format: what rows travel as on their way to experts, in order of preference, separated by commas: "exact" (the
        model's own dtype), "fp8", "int8", or a dtype such as "bfloat16". Each pair of ranks takes the first that both
        can; "fp8,int8,exact" is a good choice where bandwidth is short. Results go home exact.
    per_expert_sums: send one row per (token, expert) home instead of one partial sum per (token, rank). Slower, but
        the result then does not depend on the placement, to the last bit.
    expert_kernel: "grouped" (ours), "transformers" (its registered experts function), or "auto" (ours on CPU).
    replica_choice: where an expert has replicas, which one a token goes to: "static" (the placement's shares), "local"
        (one of this rank, else of this node, else by shares), or "balanced" (split anew for every batch, from all
        ranks' counts and speeds; one small exchange more per expert layer).
    rebalance: "off", or "auto": every `rebalance_every` forward passes look whether another placement would pay, and
        move experts to it while the model runs, in slices of at most `rebalance_slice_mib` MiB per rank and pass.
    rebalance_stall_s: seconds without progress after which a move is reported on stderr.
    dense_kernel: "torch", or "auto": half-precision linear layers of a few rows on a CPU (decode) in C.
    """

    cluster: str | None = None
    timeout_s: float = 300.0
    device: str = "auto"
    transport: str = "auto"
    bridge: str = "zeromq"
    bridge_encryption: str = "off"
    wire_format: str = "exact"
    per_expert_sums: bool = False
    expert_kernel: str = "auto"
    dense_kernel: str = "auto"
    replica_choice: str = "static"
    rebalance: str = "off"
    rebalance_every: int = 200
    rebalance_slice_mib: float = 8.0
    rebalance_stall_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s must be positive, got {self.timeout_s!r}")
        if not self.device.isidentifier():
            raise ConfigError(f"device must be auto, cpu or a device type such as cuda, got {self.device!r}")
        if self.transport not in TRANSPORTS:
            raise ConfigError(f"transport must be one of {', '.join(TRANSPORTS)}, got {self.transport!r}")
        if self.bridge not in BRIDGES:
            raise ConfigError(f"bridge must be one of {', '.join(BRIDGES)}, got {self.bridge!r}")
        if self.bridge_encryption not in ("off", "on"):
            raise ConfigError(f"bridge_encryption must be off or on, got {self.bridge_encryption!r}")
        if self.bridge_encryption == "on" and (self.bridge != "zeromq" or self.transport in ("gloo", "mpi")):
            other = f"bridge {self.bridge}" if self.bridge != "zeromq" else f"transport {self.transport}"
            raise ConfigError(f'bridge_encryption = "on": {other} encrypts nothing; ZeroMQ does')
        if self.expert_kernel not in KERNELS:
            raise ConfigError(f"expert_kernel must be one of {', '.join(KERNELS)}, got {self.expert_kernel!r}")
        if self.dense_kernel not in DENSE_KERNELS:
            raise ConfigError(f"dense_kernel must be one of {', '.join(DENSE_KERNELS)}, got {self.dense_kernel!r}")
        if self.replica_choice not in REPLICA_CHOICES:
            raise ConfigError(
                f"replica_choice must be one of {', '.join(REPLICA_CHOICES)}, got {self.replica_choice!r}"
            )
        if self.rebalance not in ("off", "auto"):
            raise ConfigError(f"rebalance must be off or auto, got {self.rebalance!r}")
        for name in ("rebalance_every", "rebalance_slice_mib", "rebalance_stall_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)!r}")

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
