"""What a launcher does for a job that survives losses: it runs the coordinator, tells it which ranks have ended, and
kills those that the others go on without. A coordinator that ends is started again; the job does not wait for it.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..comm.locks import calls, job_keys
from ..comm.messages import open_socket, pack, unpack, zmq
from ..control.words import BEAT_S, MAX_BYTES, PROTOCOL, Message
from ..core import environment
from .local import Fence, More, Over
from .process import say

_QUICK_S, _QUICK_ENDS = 2.0, 5  # a coordinator that ends so soon, so often, is not started again


@dataclass(frozen=True)
class Survival:
    """on_loss: of words.ON_LOSS. silence_s: of a rank, before it is taken for lost. restarts: of lost ranks, in all.
    metrics_port, drain_slower_than: see the coordinator's settings (control/server.py)."""

    on_loss: str
    silence_s: float
    restarts: int = 0
    metrics_port: int = 0
    drain_slower_than: float = 0.0


class Keeper:
    """events: gets Fence, More and Over. address, port: where the coordinator listens. host: a name that no other host
    of the job has. serves: the coordinator runs here; else another host's keeper runs it. Use it as a context manager.
    """

    def __init__(
        self,
        survival: Survival,
        size: int,
        address: str,
        port: int,
        log_dir: Path,
        events: queue.SimpleQueue,
        secret: str,
        host: str,
        serves: bool = True,
    ) -> None:
        self.address, self.port, self.secret = address, port, secret
        self.survival, self._host = survival, host
        self._log_dir, self._events, self._size = log_dir, events, size
        self._folder = Path(tempfile.mkdtemp(prefix="moe-launch-"))  # for this user only
        self._file = self._folder / "coordinator.json"
        told = {"address": address, "port": port, "secret": self.secret, "silence_s": survival.silence_s}
        told |= {"on_loss": survival.on_loss, "log_dir": str(log_dir.resolve()), "host": host}
        with os.fdopen(os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            json.dump(told, file)
        self._exits: dict[int, Message] = {}  # by process id: said again to a coordinator that has come back
        self._started: set[int] = set()  # ranks that this host has started, or is about to
        self._to_send: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._mark = secrets.token_hex(8)
        self._done = threading.Event()
        self._process = self._start(returning=0) if serves else None
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    @property
    def variables(self) -> Mapping[str, str]:
        """What ranks need in their environment."""
        return {environment.SURVIVAL: str(self._file)}

    def exited(self, rank: int, pid: int, how: str) -> None:
        """A rank's process has ended."""
        message = {"kind": "exited", "rank": rank, "pid": pid, "how": how}
        self._exits[pid] = message
        self._to_send.put(message)

    def started(self, rank: int) -> None:
        """A rank's process has been started. Where it takes another's place, a coordinator that comes back must not
        take it for the old one."""
        self._started.add(rank)
        self._exits = {pid: message for pid, message in self._exits.items() if message["rank"] != rank}

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(5.0)
        if self._process is not None:
            with suppress(OSError):
                self._process.stdin.close()  # it ends with its stdin
            try:
                self._process.wait(5.0)  # others may not have heard yet that the job is over
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, returning: int) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "moe_runtime.control.server"], stdin=subprocess.PIPE, start_new_session=True
        )
        settings: dict[str, Any] = {"address": self.address, "port": self.port, "secret": self.secret}
        survival = self.survival
        settings |= {"metrics_port": survival.metrics_port, "drain_slower_than": survival.drain_slower_than}
        settings |= {"size": self._size, "silence_s": self.survival.silence_s, "log_dir": str(self._log_dir)}
        assert process.stdin is not None
        process.stdin.write(json.dumps({**settings, "returning": returning}).encode() + b"\n")
        process.stdin.flush()
        return process

    def _run(self) -> None:
        context = zmq.Context()
        link = open_socket(context, zmq.DEALER)
        link.maxmsgsize = MAX_BYTES
        link.reconnect_ivl, link.reconnect_ivl_max = 50, 200
        calls(link, job_keys(bytes.fromhex(self.secret)))
        link.connect(f"tcp://{self.address}:{self.port}")
        about = {"protocol": PROTOCOL, "host": self._host, "mark": self._mark}
        beaten, began, quick, ended, over = 0.0, time.monotonic(), 0, 0, False
        while not self._done.is_set():
            now = time.monotonic()
            if self._process is not None and self._process.poll() is not None and not over:
                quick = quick + 1 if now - began < _QUICK_S else 0
                if quick >= _QUICK_ENDS:
                    over = True
                    self._events.put(Over(f"the coordinator has ended {quick} times in a row (see above)"))
                    continue
                say(f"the coordinator has ended ({self._process.returncode}); starting it again")
                self._process.stdin.close()
                ended += 1
                self._process, began = self._start(returning=ended), now
                for message in self._exits.values():
                    self._to_send.put(message)
            while not self._to_send.empty():
                link.send(pack({**about, **self._to_send.get()}))
            if now - beaten >= BEAT_S:
                beaten = now
                link.send(pack({**about, "kind": "host", "ranks": sorted(self._started)}))
            if link.poll(20):
                answer = unpack(link.recv())
                for rank, pid in answer.get("fence", []):
                    if pid not in self._exits:
                        self._events.put(Fence(rank, pid))
                for rank, like in answer.get("start", []):
                    if rank not in self._started:
                        self._started.add(rank)
                        self._events.put(More(rank, like))
                if answer.get("over") and not over:
                    over = True
                    self._events.put(Over(answer["why"]))
        link.close(linger=200)
        context.term()
