"""What encryption of the bridge's rows costs: 2 ranks of this machine over loopback, with and without, in turns.

Rank 0 sends to rank 1 as `send` does, in chunks of 1 MiB; a round ends when rank 1 has it all and has said so. A thread
of ZeroMQ's own encrypts on one side and another decrypts on the other. The floor is TCP itself: the same bytes through
plain sockets.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...core import environment
from ..machine import free_port
from . import world
from .model import machine_line

SUBJECTS = ("off", "on")
_TIMEOUT_S = 120.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="moe-launch bench bridge", description=__doc__)
    parser.add_argument("--mib", type=int, default=256, help="bytes of a round, in MiB")
    parser.add_argument("--rounds", type=int, default=7, help="the median is shown")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    if arguments.mib < 1 or arguments.rounds < 1:
        parser.error("--mib and --rounds must be at least 1")
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as scratch:  # of this user alone: it holds the secret
        folder = Path(scratch)
        settings = {"mib": arguments.mib, "rounds": arguments.rounds, "ports": [free_port() for _ in SUBJECTS]}
        (folder / "settings.json").write_text(json.dumps({**settings, "secret": os.urandom(32).hex()}))
        say = lambda line: print(f"moe-launch: {line}", file=sys.stderr)  # noqa: E731
        found = world.run_world("moe_runtime.launch.bench.bridge", folder, 2, _TIMEOUT_S, None, say)[0]
    found["tcp"] = tcp_rates(arguments.mib, arguments.rounds)
    report = {"machine": machine_line(), "load_average": os.getloadavg()[0], "mib": arguments.mib, "gb_s": found}
    print(json.dumps(report) if arguments.json else render(report))
    return 0


def render(report: dict[str, Any]) -> str:
    lines = [
        report["machine"],
        f"{report['mib']} MiB from rank 0 to rank 1 over loopback, median (slowest to fastest):",
    ]
    names = {"off": "rows not encrypted", "on": "rows encrypted (CURVE)", "tcp": "TCP alone, two threads"}
    for key, rates in report["gb_s"].items():
        lines.append(f"{names[key]:<26}{statistics.median(rates):6.2f} GB/s ({min(rates):.2f} to {max(rates):.2f})")
    return "\n".join(lines)


def tcp_rates(mib: int, rounds: int) -> list[float]:
    """GB/s of plain sockets, which move the same bytes in pieces of 1 MiB."""
    piece = bytes(1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as door:
        to = socket.create_connection(door.getsockname())
        source, _ = door.accept()

    def send() -> None:
        for _ in range(mib * rounds):
            to.sendall(piece)

    def receive() -> None:
        left, room = mib << 20, memoryview(bytearray(1 << 20))
        while left:
            left -= source.recv_into(room[: min(left, len(room))])

    with to, source:
        sender = threading.Thread(target=send)
        sender.start()
        rates = [_rate(mib, receive) for _ in range(rounds)]
        sender.join()
    return rates


def _rate(mib: int, work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return (mib << 20) / (time.perf_counter() - began) / 1e9


# ---- the rank's side ------------------------------------------------------------------------------------------------


def _measure(folder: Path, rank: int) -> dict[str, Any]:
    import torch

    from ...comm.bridge import meet

    settings = json.loads((folder / "settings.json").read_text())
    secret, rates = bytes.fromhex(settings["secret"]), {subject: list[float]() for subject in SUBJECTS}
    transports = {
        subject: meet(rank, 2, "127.0.0.1", port, _TIMEOUT_S, {}, secret=secret, encrypt=subject == "on")
        for subject, port in zip(SUBJECTS, settings["ports"], strict=True)
    }
    payload = torch.zeros(settings["mib"] << 20, dtype=torch.uint8)

    def one_round(transport: Any) -> None:
        if rank == 0:
            transport.send(payload, 1, "bench")
        else:
            transport.recv(payload, 0, "bench")
        transport.barrier("bench")

    for number in range(settings["rounds"] + 1):
        for subject, transport in transports.items():
            rate = _rate(settings["mib"], lambda transport=transport: one_round(transport))
            if number:  # the first is for page faults and connections
                rates[subject].append(rate)
    for transport in transports.values():
        transport.close()
    return rates


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), environment.read_world().rank
    world.answer(folder, rank, lambda: _measure(folder, rank))
