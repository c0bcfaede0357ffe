"""One question to a coordinator, one answer: for people's tools, which are no ranks."""

from __future__ import annotations

import time

from ..comm.locks import calls, job_keys
from ..comm.messages import open_socket, pack, unpack, zmq
from .words import MAX_BYTES, PROTOCOL, Message


class Client:
    """secret: the job's, as bytes."""

    def __init__(self, address: str, port: int, secret: bytes) -> None:
        self.where = f"{address}:{port}"
        self._context = zmq.Context()
        self._socket = open_socket(self._context, zmq.DEALER)
        self._socket.maxmsgsize = 64 * MAX_BYTES  # a status of thousands of ranks
        self._socket.linger = 0
        calls(self._socket, job_keys(secret))
        self._socket.connect(f"tcp://{self.where}")

    def ask(self, message: Message, seconds: float) -> Message | None:
        """The answer, or None where none came in time: nobody is there, or the secret is another."""
        while self._socket.poll(0):
            self._socket.recv()  # late, and to an earlier question
        self._socket.send(pack({"protocol": PROTOCOL, **message}))
        ends = time.monotonic() + seconds
        while self._socket.poll(max(0.0, ends - time.monotonic()) * 1000):
            try:
                answer = unpack(self._socket.recv())
            except ValueError:
                continue
            if isinstance(answer, dict):
                return answer
        return None

    def close(self) -> None:
        self._socket.close()
        self._context.term()
