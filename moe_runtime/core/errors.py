"""Every error moe-runtime raises on purpose. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "MoeRuntimeError",
    "PeerLost",
    "PeerTimeout",
    "VendorUnavailable",
    "ViewPassed",
]


class MoeRuntimeError(Exception):
    """Base of every error moe-runtime raises on purpose."""


class ConfigError(MoeRuntimeError, ValueError):
    """A configuration, cluster file, argument or tensor that cannot be used as given."""


class CheckpointError(MoeRuntimeError, ValueError):
    """A checkpoint that cannot be read, is incomplete, or cannot be written."""


class VendorUnavailable(MoeRuntimeError, ValueError):
    """A device, plug-in or library that was asked for and is not on this machine."""


class NotFinite(MoeRuntimeError, ArithmeticError):
    """A loss or gradient that is not a number: training stops before it is applied."""


class PeerLost(MoeRuntimeError, ConnectionError):
    """A rank went away while others were exchanging data with it.

    Attributes: `rank` (the lost rank, or None where the transport cannot tell which one) and `phase`
    (what this rank was doing, such as "dispatch").
    """

    def __init__(self, message: str, *, rank: int | None, phase: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.phase = phase


class PeerTimeout(MoeRuntimeError, TimeoutError):
    """A deadline passed while this rank waited for others.

    Attributes: `waiting_rank` (who waited), `ranks` (for whom it may have waited), `phase`.
    """

    def __init__(self, message: str, *, waiting_rank: int, ranks: tuple[int, ...], phase: str) -> None:
        super().__init__(message)
        self.waiting_rank = waiting_rank
        self.ranks = ranks
        self.phase = phase


class ViewPassed(MoeRuntimeError):
    """What was begun in a view cannot be finished: a newer one was announced meanwhile. See Runtime.recover."""
