"""The public names of moe-runtime's errors (they live in the core layer)."""

from .core.errors import (
    CheckpointError,
    ConfigError,
    MoeRuntimeError,
    NotFinite,
    PeerLost,
    PeerTimeout,
    VendorUnavailable,
    ViewPassed,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "MoeRuntimeError",
    "NotFinite",
    "PeerLost",
    "PeerTimeout",
    "VendorUnavailable",
    "ViewPassed",
]
