"""Nobody is let in: who has not got a job's secret is turned away from its ports and counted, and the job goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import strangers
import torch
import zmq
import zmq.utils.z85
from hosts import MOE_LAUNCH
from ranks import run_ranks
from strangers import Relay, dealer, listening, silent, speak, started_by, until
from test_bridge import check_exchanges

import moe_runtime
from moe_runtime.comm import bridge, locks
from moe_runtime.comm.locks import HANDSHAKE_S, Doorkeeper, Passes, Tally, in_words, job_keys, listens, pass_of, z85
from moe_runtime.comm.messages import pack, unpack
from moe_runtime.core import environment
from moe_runtime.errors import ConfigError, PeerLost, PeerTimeout
from moe_runtime.launch.control import MESSAGE_BYTES, Link, to_bytes
from moe_runtime.launch.machine import free_port

SECRET = b"the job's secret"
TEXT = "a secret of the user's"
HOST = "127.0.0.1"


# ---- without sockets ------------------------------------------------------------------------------------------------


def test_messages_are_bounded_in_bytes_depth_and_items():
    nested = 3
    for _ in range(20):
        nested = [nested]
    assert unpack(pack({"a": nested}), 100, depth=21) == {"a": nested}
    with pytest.raises(ValueError, match="more than 20 deep"):
        unpack(pack({"a": nested}), 100, depth=20)
    with pytest.raises(ValueError, match="larger than the limit of 10"):
        unpack(pack("x" * 10), 10)
    assert len(unpack(pack([[1] * 50] * 50), items=2550)) == 50
    with pytest.raises(ValueError, match="more than 2549 items"):
        unpack(pack([[1] * 50] * 50), items=2549)
    # Lists in lists, each of which promises a million members: nothing makes room for them.
    for hostile in (b"\xdd\x00\x0f\xff\xff" * 1000, b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff" * 100):
        began = time.monotonic()
        with pytest.raises(ValueError):
            unpack(hostile, 1 << 20)
        assert time.monotonic() - began < 0.5


def test_only_the_clients_key_and_a_ranks_own_pass_are_let_in():
    keys, passes = job_keys(SECRET), Passes(b"t" * 32, ["rank 0", "rank 2"])
    theirs = zmq.utils.z85.decode(keys.client_public)
    others = zmq.utils.z85.decode(job_keys(b"another").client_public)
    assert z85(theirs) == keys.client_public
    assert locks.refusal(b"CURVE", [theirs], keys, None) == ""
    for mechanism, shown in ((b"CURVE", [others]), (b"CURVE", []), (b"NULL", []), (b"PLAIN", [b"rank 0", b""])):
        assert locks.refusal(mechanism, shown, keys, None)
    word = pass_of(b"t" * 32, "rank 2").encode()
    assert locks.refusal(b"PLAIN", [b"rank 2", word], keys, passes) == ""
    for name in (b"rank 0", b"rank 1", b"\xff\xfe"):
        assert locks.refusal(b"PLAIN", [name, word], keys, passes) == "connections with a wrong pass"
    passes.over = True
    assert "after the meeting" in locks.refusal(b"PLAIN", [b"rank 2", word], keys, passes)


def test_a_monitors_events_are_counted_by_reason():
    tally = Tally()
    failed = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    for kind, value in [
        (zmq.EVENT_ACCEPTED, 7), (zmq.EVENT_HANDSHAKE_SUCCEEDED, 0),
        (zmq.EVENT_ACCEPTED, 8), (failed, 0x11000002), (zmq.EVENT_DISCONNECTED, 8),
        (zmq.EVENT_ACCEPTED, 8), (failed, 0x11000001), (zmq.EVENT_DISCONNECTED, 8),
        (zmq.EVENT_ACCEPTED, 8), (failed, 0x10000013), (zmq.EVENT_DISCONNECTED, 8),
        (zmq.EVENT_ACCEPTED, 8), (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, errno.EAGAIN), (zmq.EVENT_DISCONNECTED, 8),
        (zmq.EVENT_ACCEPTED, 8), (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, errno.EPIPE), (zmq.EVENT_DISCONNECTED, 8),
        (zmq.EVENT_ACCEPTED, 8), (zmq.EVENT_DISCONNECTED, 8),
        (zmq.EVENT_ACCEPTED, 8), (zmq.EVENT_HANDSHAKE_FAILED_AUTH, 400), (zmq.EVENT_DISCONNECTED, 8),
        (zmq.EVENT_DISCONNECTED, 7),
    ]:  # fmt: skip
        tally.event(kind, value)
    assert tally.refused == {
        "connections without a key": 2,
        "connections without the job's key": 1,
        "connections with a broken handshake": 1,
        "connections that said nothing": 1,
        "connections that were not ZeroMQ": 1,
    }
    assert in_words({"connections without the job's key": 3}) == "refused: 3 connections without the job's key"
    assert in_words({}) == ""


def test_a_secret_comes_from_a_private_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(environment.SECRET, raising=False)
    monkeypatch.delenv(environment.SECRET_FILE, raising=False)
    assert environment.job_secret() is None
    monkeypatch.setenv(environment.SECRET, TEXT)
    assert len(environment.job_secret()) == 32
    path = tmp_path / "secret"
    monkeypatch.setenv(environment.SECRET_FILE, str(path))
    for text, mode, told in (
        (None, 0, "cannot be read"),
        ("ab" * 16, 0o640, "others may read"),
        ("not hex", 0o600, "not hexadecimal"),
        ("abcd", 0o600, "too few"),
    ):
        if text is not None:
            path.write_text(text)
            path.chmod(mode)
        with pytest.raises(ConfigError, match=told):
            environment.job_secret()
    path.write_text("ab" * 16)
    assert environment.job_secret() == b"\xab" * 16


@pytest.mark.parametrize("header", [
    b"", b"\xc1", pack("x"), pack([1, 2]), pack([1, 2, 3, 4]), pack(["pair", 1, 0]), pack([["pair"], 1, 0]),
    pack([1, 5, 1]), pack([1, -5, 0]), pack([1, 1 << 20, 1]), pack([1, True, 0]), pack([1.0, 1, 0]), pack([-2, 1, 0]),
    pack([1, 1 << 70 >> 7, -1]), pack([["pair", [1]], 1, 0]), pack([1, 1, 0]) + b"x" * 80,
])  # fmt: skip
def test_a_header_that_is_none_is_refused(header):
    with pytest.raises(ValueError):
        bridge.read_header(header, 1)


def test_a_header_says_what_comes():
    assert bridge.read_header(pack([3, (1 << 20) + 1, 1]), 1) == (3, (1 << 20) + 1, 1)
    assert bridge.read_header(pack([["pair", 2], 0, 0]), 1) == (("pair", 2), 0, 0)
    assert bridge.read_header(pack([-1, 0, 0]), 0) == (-1, 0, 0)
    for parts in (0, 2):
        with pytest.raises(ValueError):
            bridge.read_header(pack([3, 5, 0]), parts)


# ---- one door -------------------------------------------------------------------------------------------------------


@contextmanager
def door(secret=SECRET):
    context = zmq.Context()
    socket, keeper = context.socket(zmq.ROUTER), Doorkeeper(context, job_keys(secret))
    listens(socket, job_keys(secret))
    locks.set_bounds(socket, 1000)
    keeper.watch(socket)
    port = socket.bind_to_random_port(f"tcp://{HOST}")
    try:
        yield socket, keeper, port
    finally:
        keeper.close()
        context.destroy(linger=0)


def test_a_door_lets_in_who_has_the_key_and_counts_the_rest():
    with door() as (socket, keeper, port):
        with dealer(HOST, port, SECRET) as client:
            client.send(b"good day")
            assert socket.poll(5000) and socket.recv_multipart()[1] == b"good day"
        for secret in (None, b"another"):
            with dealer(HOST, port, secret) as client:
                client.send(b"let me in")
                assert not socket.poll(300)
        until(lambda: sum(keeper.refused.values()) == 2, "two refusals")
        assert keeper.refused == {"connections without a key": 1, "connections without the job's key": 1}


def test_a_client_with_the_servers_key_and_not_the_clients_is_refused():
    """Nobody has one without the other; what is tested is that the Doorkeeper's no is obeyed and counted once."""
    with door() as (socket, keeper, port):
        public, secret = zmq.curve_keypair()
        keys = {"curve_serverkey": job_keys(SECRET).server_public, "curve_publickey": public, "curve_secretkey": secret}
        with dealer(HOST, port, **keys) as client:
            client.send(b"let me in")
            assert not socket.poll(300)
        assert keeper.refused == {"connections without the job's key": 1}


# ---- a live bridge --------------------------------------------------------------------------------------------------


def attack(address: str, port: int, recorded: bytes) -> None:
    """All that must be turned away from a port whose handshake is CURVE's or PLAIN's; waits until it has been."""
    with silent(address, port, 1000) as held:
        attack_meanwhile(address, port, recorded)
        for connection in held:
            connection.settimeout(HANDSHAKE_S + 15)
            while connection.recv(1 << 10):  # the greeting, then the end
                pass


def attack_meanwhile(address: str, port: int, recorded: bytes) -> None:
    for options in (
        {},
        {"secret": b"another job's"},
        {"plain_username": b"rank 1", "plain_password": pass_of(b"another token", "rank 1").encode()},
        {"identity": b"rank 1"},
    ):
        with dealer(address, port, **options) as client:
            client.send_multipart([pack([1, 5, 0]), b"let me in"])
            assert not client.poll(300)
    assert len(recorded) > 200
    speak(address, port, recorded, HANDSHAKE_S + 5)
    whole = (1 << 40).to_bytes(8, "big")
    for data in (
        b"GET / HTTP/1.1\r\n\r\n",  # not ZeroMQ
        os.urandom(300),
        b"\x01\x00",  # ZMTP 1.0
        strangers.NULL.replace(b"\x7f\x03\x01", b"\x7f\x09\x00"),  # a ZMTP of the future
        strangers.CURVE + b"\x06" + whole,  # a handshake of a terabyte
        strangers.PLAIN + b"\x06" + whole,
    ):
        speak(address, port, data, HANDSHAKE_S + 5)


def a_bridge_under_attack(settings: dict) -> list[str]:
    """Rank 2 reaches rank 0 through a relay that records, attacks it while all are connected, and all go on."""
    relays, ends = [], []
    original = bridge.report_to_rank_0

    def report(*arguments):
        table = original(*arguments)
        ends[:] = table[0]["endpoint"].removeprefix("tcp://").split(":")
        relays.append(Relay(ends[0], int(ends[1])))
        return [{**table[0], "endpoint": f"tcp://{HOST}:{relays[0].port}"}, *table[1:]]

    if os.environ["RANK"] == "2":
        bridge.report_to_rank_0 = report
    with moe_runtime.init({"transport": "zeromq", "timeout_s": 100, **settings}) as runtime:
        transport, rank = runtime.transport, runtime.rank
        first = transport.all_gather(torch.arange(3.0) + rank, "test")
        if rank == 2:
            attack(ends[0], int(ends[1]), relays[0].sent)
        again = transport.all_gather(torch.arange(3.0) + rank, "test")
        assert first.tolist() == again.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
        return transport.describe()


def counted(line: str) -> dict[str, int]:
    return {reason: int(count) for count, reason in re.findall(r"(\d+) ([a-zA-Z' ]+)", line.partition("refused: ")[2])}


@pytest.mark.parametrize("encryption", ["off", "on"])
def test_a_bridge_turns_strangers_away_and_its_rows_arrive(encryption):
    env = {environment.SECRET: TEXT}
    [line], *others = run_ranks(a_bridge_under_attack, 3, {"bridge_encryption": encryption}, env=env)
    print(line)
    assert f"rows are {'encrypted' if encryption == 'on' else 'not encrypted'}" in line
    refused = counted(line)
    assert refused["connections that said nothing"] == 1000
    assert refused["connections that were not ZeroMQ"] >= 3
    assert sum(refused.values()) == 1011, refused
    if encryption == "off":
        assert refused["connections with a wrong pass"] == 1
        assert refused["connections with a pass after the meeting"] == 1  # what was recorded
    else:
        assert refused["connections without the job's key"] >= 1
        assert refused["connections with a broken handshake"] >= 1  # what was recorded
    assert all("refused" not in line for [line] in others)
