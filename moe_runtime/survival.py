"""A rank's part in views: the first one, the next one after a loss, and one that is taken up between two steps.

The coordinator and its agents (control/) decide who is a member. Here a view becomes a transport: members leave where
they can be reached with the coordinator, over its authenticated channel, and connect to each other anew. Nothing of the
transport before is used again, so what a rank that is gone had begun to send can never be read.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from .comm.bridge import meet_through
from .comm.locks import job_keys
from .comm.messages import pack, unpack
from .comm.place import Place
from .comm.rendezvous import can_share_memory
from .comm.shm import SharedMemoryTransport
from .comm.staging import StagedTransport
from .comm.transport import Interruption, LocalTransport, Transport
from .control.member import Member, Notice
from .control.words import OVER
from .core.environment import address_towards, is_loopback
from .core.errors import ConfigError, MoeRuntimeError, PeerLost, PeerTimeout, ViewPassed

LOST = (PeerLost, PeerTimeout, ViewPassed)  # what Runtime.recover is for
READ_BYTES_PER_S = 10e6  # of the slowest storage that others wait for while a rank reads lost experts
PATIENCE_S = 300.0  # for a view: the coordinator itself is watched by the agent, and watches the others
_TRANSPORTS = ("auto", "shm", "zeromq")


@dataclass(frozen=True)
class Settings:
    """What the launcher says of the coordinator. on_loss: one of words.ON_LOSS."""

    address: str
    port: int
    secret: str
    silence_s: float
    on_loss: str
    log_dir: str
    host: str

    @staticmethod
    def read(path: Path) -> Settings:
        try:
            return Settings(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}: not what moe-launch writes for its ranks ({error})") from None


class Survival:
    """This rank's agent, and how it turns views into transports."""

    def __init__(
        self, settings: Settings, number: int, kind: str, about: dict[str, Any], timeout_s: float, encrypt: bool
    ) -> None:
        if kind not in _TRANSPORTS:
            raise ConfigError(f"--on-loss {settings.on_loss}: transport {kind} cannot take up new views; use auto")
        self.settings, self.number, self._kind, self._about = settings, number, kind, about
        self.timeout_s, self._patience_s = timeout_s, max(timeout_s, PATIENCE_S)
        self.member = Member(
            settings.address,
            settings.port,
            job_keys(bytes.fromhex(settings.secret)),
            number,
            settings.silence_s,
            settings.host,
        )
        self.entered = 0  # the latest view that this rank has begun to build
        self.notes: list[str] = []
        self._encrypt = encrypt
        self._interruption = Interruption()
        self.member.on_view = self._interrupt

    def first(self) -> Notice | None:
        """The view the job begins with; None where it has begun and this rank is one more. Ends this process, with
        code 0, where the work is done already."""
        try:
            return self.member.first_view(self._patience_s)
        except MoeRuntimeError:
            if self.member.stopped != OVER:
                raise
        print(f"rank {self.number}: {OVER}, there is nothing left to join", file=sys.stderr)
        raise SystemExit(0)

    def next(self) -> Notice:
        """The view after the one entered last. Waits for it."""
        return self.member.await_view(self.entered, self._patience_s)

    def report(self, members: Sequence[int], error: Exception) -> None:
        """Tell the coordinator whom an exchange of the view entered last was lost by. members: of that view."""
        places: tuple[int, ...] = ()
        if isinstance(error, PeerLost) and error.rank is not None:
            places = (error.rank,)
        elif isinstance(error, PeerTimeout):
            places = error.ranks
        suspects = [members[place] for place in places if place < len(members)]
        if not isinstance(error, ViewPassed):
            self.member.report_lost(self.entered, suspects, str(error), isinstance(error, PeerTimeout))

    def build(self, notice: Notice, place: Place) -> Transport:
        """The transport of a view. Raises LOST where another member is lost meanwhile, ConfigError where members do not
        fit together."""
        self.entered = notice.number
        position = notice.members.index(self.number)
        self._interruption = interruption = Interruption()
        said = self._exchange("who", [_host(), can_share_memory(place), self._about])
        for number, (_, _, about) in zip(notice.members, said, strict=True):
            if about != self._about:
                raise ConfigError(f"rank {number} disagrees with rank {self.number}: {about} against {self._about}")
        one_host = len({host for host, _, _ in said}) == 1 and all(shares for _, shares, _ in said)
        if len(said) == 1:
            made: Transport = LocalTransport(self.timeout_s)
        elif one_host and self._kind != "zeromq":
            made = SharedMemoryTransport(_Table(self), position, len(said), self.timeout_s, interruption=interruption)
        elif self._kind == "shm":
            raise ConfigError("transport shm: the ranks are not on one host; use auto or zeromq")
        else:
            address, port = self.settings.address, self.settings.port
            host = address if is_loopback(address) else address_towards(address, port)
            secret = bytes.fromhex(self.settings.secret)
            made = meet_through(
                lambda mine: self._exchange("bridge", mine),
                position,
                len(said),
                host,
                self.timeout_s,
                secret,
                self._encrypt,
                interruption,
            )
        return StagedTransport(made) if isinstance(made, SharedMemoryTransport) and place.device.type != "cpu" else made

    def _exchange(self, key: str, value: Any) -> list[Any]:
        return [unpack(data) for data in self.exchange(key, pack(value))]

    def exchange(self, key: str, value: bytes, seconds: float = 0.0) -> list[bytes]:
        """Every member's value of the view that is being built, in rank order. seconds: to wait, beyond what others are
        waited for anyhow. Raises as Member.exchange."""
        return self.member.exchange(self.entered, key, value, self._patience_s + seconds)

    def reading(self, count: int) -> Callable[[int], None]:
        """To be called with the number of experts that have been read, of `count`, before each: shows it, and raises
        ViewPassed where a newer view has come meanwhile."""
        state, interruption = self.member.state, self._interruption

        def progress(done: int) -> None:
            interruption.check(self.number, "reading lost experts")
            state.update(phase="reading", layer=f"{100 * done // count}%")

        return progress

    def await_readers(self, most_bytes: int) -> None:
        """Until every rank of the view has read its part. most_bytes: that one of them reads. Raises as exchange."""
        self.member.state.update(phase="others read", layer="")
        self.exchange("experts read", b"", most_bytes / READ_BYTES_PER_S)

    def _interrupt(self, newest: Notice) -> None:
        """In the agent's thread: whatever waits in an older view ends."""
        if newest.number > self.entered and not newest.at_boundary:
            self._interruption.why = f"view {newest.number} has taken its place ({newest.why})"

    def describe(self) -> str:
        """A line for people."""
        settings = self.settings
        return (
            f"when a rank is lost: {settings.on_loss}; rank {self.number} for life; coordinator at {settings.address}:"
            f"{settings.port}; a rank that is silent for {settings.silence_s:g} s is lost"
        )

    def close(self) -> None:
        self.member.close()


class _Table:
    """What SharedMemoryTransport needs of a store: every rank sets one value, and all get all."""

    def __init__(self, survival: Survival) -> None:
        self._survival = survival
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        name = key.rpartition("/")[0]
        values = self._survival.exchange(name, value.encode())
        self._values = {f"{name}/{place}": one for place, one in enumerate(values)}

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        missing = [key for key in keys if key not in self._values]
        if missing:
            raise TimeoutError(f"nobody has left {missing[0]}")

    def get(self, key: str) -> bytes:
        return self._values[key]


def _host() -> str:
    """What tells one running machine and network namespace from another."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')}"
    return socket.gethostname()
