"""CURVE (ZeroMQ's authenticated encryption) by a job's secret: who has the secret can speak, nobody else.

Every process of a job derives the same two key pairs from the secret: one for whoever listens, one for whoever calls.
Source: ZeroMQ RFC 26 (CurveZMQ): a handshake with fresh keys for each connection, so that nothing recorded can be
played again, and a number in every message.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from ..core.errors import ConfigError
from .messages import zmq

_Z85 = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


@dataclass(frozen=True)
class JobKeys:
    """Two CURVE key pairs, each key 40 characters of Z85 (RFC 32)."""

    server_public: bytes
    server_secret: bytes
    client_public: bytes
    client_secret: bytes


def job_keys(secret: bytes) -> JobKeys:
    """The keys that follow from a job's secret. Raises ConfigError where this ZeroMQ was built without CURVE."""
    if not zmq.has("curve"):
        raise ConfigError(
            "this pyzmq was built without CURVE (libsodium); install the wheel of PyPI: pip install pyzmq"
        )
    pairs = []
    for end in ("server", "client"):
        private = z85(hmac.digest(secret, f"moe-runtime curve {end}".encode(), hashlib.sha256))
        pairs += [zmq.curve_public(private), private]
    return JobKeys(*pairs)


def listens(socket: zmq.Socket, keys: JobKeys, domain: str = "moe-runtime") -> None:
    """Before bind: only who has the server's public key can speak to this socket, and whoever answers ZAP may refuse."""
    socket.curve_server = True
    socket.curve_secretkey, socket.curve_publickey = keys.server_secret, keys.server_public
    socket.zap_domain = domain.encode()


def calls(socket: zmq.Socket, keys: JobKeys) -> None:
    """Before connect."""
    socket.curve_serverkey = keys.server_public
    socket.curve_secretkey, socket.curve_publickey = keys.client_secret, keys.client_public


def z85(data: bytes) -> bytes:
    """Bytes in multiples of four, as Z85 text (RFC 32)."""
    out = bytearray()
    for at in range(0, len(data), 4):
        number = int.from_bytes(data[at : at + 4], "big")
        out += bytes(_Z85[number // 85**power % 85] for power in (4, 3, 2, 1, 0))
    return bytes(out)
