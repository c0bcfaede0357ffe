"""Nobody is let in: who has not got a job's secret is turned away from its ports and counted, and the job goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import strangers
import torch
import zmq
import zmq.utils.z85
from hosts import MOE_LAUNCH, Hosts
from ranks import run_ranks
from strangers import Relay, dealer, listening, silent, speak, started_by, until

import moe_runtime
from moe_runtime.comm import bridge, locks
from moe_runtime.comm.locks import HANDSHAKE_S, Doorkeeper, Passes, Tally, in_words, job_keys, listens, pass_of, z85
from moe_runtime.comm.messages import pack, unpack
from moe_runtime.core import environment
from moe_runtime.errors import ConfigError, PeerLost, PeerTimeout
from moe_runtime.launch import records
from moe_runtime.launch.bench.world import find_mpirun
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
    for ending in ([], [(failed, 0x10000013)], [(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, errno.EPIPE)]):
        before = tally.refused.total()
        tally.event(zmq.EVENT_ACCEPTED, 8)
        tally.deny("connections with a wrong pass")
        for kind, value in (*ending, (zmq.EVENT_DISCONNECTED, 8)):
            tally.event(kind, value)
        assert tally.refused.total() == before + 1
    assert tally.refused["connections with a wrong pass"] == 3
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


def without_a_secret() -> list[str]:
    with moe_runtime.init({"transport": "zeromq", "timeout_s": 30}) as runtime:
        endpoints: list = runtime.transport._inbox.last_endpoint.decode().removeprefix("tcp://").split(":")
        everyone = runtime.transport.all_gather(torch.tensor([int(endpoints[1])]), "test").view(-1).tolist()
        if runtime.rank == 1:
            for identity in (b"", b"rank 9", b"rank 0", b"rank one", b"rank 1"):  # the last one is taken
                with dealer(HOST, everyone[0], identity=identity) as client:
                    client.send_multipart([pack([1, 5, 0]), b"x" * 5])
                    client.send(b"\xc1")
                    time.sleep(0.2)
            with socket.create_connection((HOST, everyone[0])) as garbage:
                garbage.sendall(b"GET / HTTP/1.1\r\n\r\n")
        total = torch.tensor([runtime.rank + 1.0])
        runtime.transport.all_reduce(total, "test")
        assert total == 3.0
        return runtime.transport.describe()


def test_without_a_secret_it_works_says_so_and_drops_strangers_frames():
    [line], _ = run_ranks(without_a_secret, 2)
    assert line.startswith("bridge: not authenticated (started without moe-launch")
    assert counted(line)["messages of strangers"] == 8


def a_peer_sends_nonsense(fields: list[int], parts: list[bytes]) -> str:
    with moe_runtime.init({"transport": "zeromq", "timeout_s": 10}) as runtime:
        transport = runtime.transport
        transport.barrier("test")
        if runtime.rank == 1:
            time.sleep(0.3)
            header = pack([transport._operation + 1, *fields]) if fields else b"\xc1"
            transport._out[0].send_multipart([header, *parts])
            time.sleep(1.0)
            return ""
        with pytest.raises(PeerLost) as caught:
            transport.all_gather(torch.zeros(4), "the test's exchange")
        assert caught.value.rank == 1
        return str(caught.value)


@pytest.mark.parametrize("fields, parts, told", [
    ([], [b""], "sent what is no frame of rows"),
    ([16, 0], [], "sent what is no frame of rows (0 parts)"),
    ([16, 3], [b"x" * 16], "sent what is no frame of rows (chunk 3 of 16 bytes"),
    ([16, 0], [b"x" * 15], "sent chunk 0 of 15 bytes where chunk 0 of 16 bytes in all was due"),
    ([17, 0], [b"x" * 17], "sent 17 bytes where 16 were expected"),
])  # fmt: skip
def test_a_peer_that_sends_nonsense_is_named(fields, parts, told):
    said = run_ranks(a_peer_sends_nonsense, 2, fields, parts, env={environment.SECRET: TEXT})[0]
    assert f"rank 0, phase the test's exchange: rank 1 {told}" in said


def with_secrets(texts: list[str], settings: dict) -> str:
    os.environ[environment.SECRET] = texts[int(os.environ["RANK"])]
    with pytest.raises((PeerTimeout, ConfigError)) as caught:
        moe_runtime.init({"transport": "zeromq", "timeout_s": 3, **settings})
    return str(caught.value)


@pytest.mark.parametrize("other, told", [("another", "without the job's key"), ("", "without a key")])
def test_a_rank_with_another_secret_or_none_is_turned_away_and_rank_0_says_so(other, told):
    said = run_ranks(with_secrets, 2, [TEXT, other], {})
    assert re.search(rf"ranks \[1\] did not come .*refused: \d+ connections {told}", said[0]), said[0]
    assert "did not answer within 3 s" in said[1]


def test_encryption_without_a_secret_is_an_error():
    said = run_ranks(with_secrets, 2, ["", ""], {"bridge_encryption": "on"})
    assert all("no secret to derive keys from" in each for each in said)
    for settings in ({"bridge": "gloo"}, {"transport": "mpi"}):
        with pytest.raises(ConfigError, match="encrypts nothing"):
            moe_runtime.init({"bridge_encryption": "on", **settings})


def differing(texts: list[str]) -> str:
    return with_secrets([TEXT, TEXT], {"bridge_encryption": texts[int(os.environ["RANK"])]})


def test_ranks_that_encrypt_and_ranks_that_do_not_are_told_so():
    assert all("disagrees with rank 0 on encrypted" in said for said in run_ranks(differing, 2, ["on", "off"]))


def met_by_a_stranger() -> list[str]:
    """Rank 1 comes late; meanwhile strangers greet rank 0."""
    port = int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] == "1":
        until(lambda: _answers(port), "rank 0 listens")
        for secret in (None, b"another"):
            with dealer(HOST, port, secret) as client:
                client.send(pack({"rank": 1, "endpoint": "tcp://127.0.0.1:1", "token": "", "size": 2}))
                assert not client.poll(500)
        speak(HOST, port, b"GET / HTTP/1.1\r\n\r\n")
    with moe_runtime.init({"transport": "zeromq", "timeout_s": 30}) as runtime:
        return runtime.transport.describe()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def test_strangers_at_the_meeting_are_counted_and_the_ranks_meet():
    [line], _ = run_ranks(met_by_a_stranger, 2, env={environment.SECRET: TEXT})
    refused = counted(line)
    assert refused["connections without the job's key"] == 1 and refused["connections that were not ZeroMQ"] == 1
    assert refused["connections without a key"] >= 1


# ---- a live job's control port, and who listens where ---------------------------------------------------------------

JOB = """
import os, sys, time
import torch, moe_runtime
settings = {"transport": sys.argv[1], "timeout_s": 60, **({"cluster": sys.argv[3]} if sys.argv[3:] else {})}
with moe_runtime.init(settings) as runtime:
    runtime.transport.barrier("test")
    print("up", flush=True)
    while not os.path.exists(sys.argv[2]):
        time.sleep(0.1)
    total = torch.tensor([runtime.rank + 1.0])
    runtime.transport.all_reduce(total, "test")
    print("total", total.item(), flush=True)
    print(*[line for line in runtime.describe().splitlines() if line.startswith("bridge:")], flush=True)
"""


@contextmanager
def job(folder: Path, commands: list[list[str]], ranks: int, env: dict | None = None):
    """moe-launch commands of one job, with all ranks up; yields the processes and ends them."""
    (folder / "job.py").write_text(JOB)
    variables = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", **(env or {})}
    started = []
    for n, words in enumerate(commands):
        with (folder / f"out{n}").open("wb") as out:
            started.append(subprocess.Popen(words, cwd=folder, stdout=out, stderr=out, env=variables))
    said = lambda: "".join((folder / f"out{n}").read_text() for n in range(len(commands)))  # noqa: E731
    try:
        ends = time.monotonic() + 60
        while said().count("] up") < ranks:
            assert time.monotonic() < ends and all(process.poll() is None for process in started), said()
            time.sleep(0.1)
        yield started, said
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(30)


def two_agents(folder: Path, port: int, *arguments: str) -> list[list[str]]:
    """A job of two nodes on loopback, 1 and 1 rank, started by hand."""
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", f"{HOST}:{port}", "--engine", "torchrun"]
    words = [str(folder / "job.py"), *arguments]
    return [[*MOE_LAUNCH, "run", *where, "--node-rank", str(n), *words] for n in (0, 1)]


def finish(folder: Path, started: list, said, total: float, ranks: int) -> None:
    (folder / "go").touch()
    assert [process.wait(60) for process in started] == [0] * len(started), said()
    assert said().count(f"total {total}") == ranks


def test_a_live_control_port_turns_strangers_away_and_the_job_ends_with_its_result(tmp_path):
    port, env = free_port(), {environment.SECRET: TEXT}
    with job(tmp_path, two_agents(tmp_path, port, "zeromq", str(tmp_path / "go")), 2, env) as (started, said):
        name = next((tmp_path / "cache" / "moe_runtime" / "jobs").glob("*.json")).stem
        secret = bytes.fromhex(json.loads(next((tmp_path / "cache").rglob("*.json")).read_text())["secret"])
        shown = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}

        def status(*words: str) -> str:
            ran = subprocess.run([*MOE_LAUNCH, "status", name, *words], env=shown, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr
            return ran.stdout

        assert json.loads(status("--json"))["refused"] == {}
        relay = Relay(HOST, port)
        link = Link(HOST, relay.port, secret)
        link.send({"kind": "status"})
        assert link.receive(5)["state"] == "running"
        attack(HOST, port, relay.sent)
        for message in ({"kind": "status", "protocol": 99}, {"kind": "nonsense"}):
            link.send(message)
            assert link.receive(5)["kind"] == "refuse"
        with dealer(HOST, port, secret) as client:
            for data in (b"\xc1", to_bytes({"kind": "stop", "why": "x" * MESSAGE_BYTES}), b"\x91" * 1000):
                client.send(data)
            client.send(b"x" * 5 * MESSAGE_BYTES)  # ends its connection
            assert not client.poll(500)
        refused = Counter(json.loads(status("--json"))["refused"])
        print(refused)
        assert refused["connections that said nothing"] == 1000
        assert refused["messages of another version"] == refused["messages not understood"] == 1
        assert refused["messages that were none"] == 2 and refused["messages that were too large"] == 1
        assert sum(count for reason, count in refused.items() if reason.startswith("connections")) == 1011
        assert "refused: " in status() and "connections without the job's key" in status()
        link.close()
        finish(tmp_path, started, said, 3.0, 2)
    assert "bridge: ranks prove the job's secret" in said()


def ports(started: list[subprocess.Popen], address: str = HOST) -> dict[str, list[set[int]]]:
    """The ports on which a local job's processes listen, by what they are. None is on another address."""
    found: dict[str, list[set[int]]] = {"agent": [], "store": [], "rank": [], "other": []}
    kinds = {"moe_runtime.launch.elastic": "store", "moe_runtime.launch.worker": "rank"}
    for process in started:
        for number, line in started_by(process.pid).items():
            kind = next((kinds[word] for word in kinds if word in line), "other")
            at = listening(number)
            assert {host for host, _ in at} <= {address}, (line, at)
            found["agent" if number == process.pid else kind].append({port for _, port in at})
    return found


CPU_ISLANDS = "".join(
    f'[[node]]\nname = "{name}"\nvendor = "cpu"\nisland = "{name}"\ndevices = {count}\n'
    for name, count in (("a", 2), ("b", 1))
)


# How many ports each rank has, in any order, and whether the first is at --master-port (docs/security.md).
@pytest.mark.parametrize("engine, transport, of_ranks, at_master_port", [
    ("local", "shm", [0, 0], False),
    ("local", "gloo", [2, 1], True),  # torch's store; gloo's own
    ("local", "islands", [3, 2, 1], False),  # the bridge; in the larger island torch's store and gloo's own
    ("torchrun", "zeromq", [1, 1], False),
])  # fmt: skip
def test_a_jobs_processes_listen_at_the_documented_ports_only(tmp_path, engine, transport, of_ranks, at_master_port):
    port, words, more = free_port(), ["--nproc-per-node", "2"], []
    if transport == "islands":
        (tmp_path / "c.toml").write_text(CPU_ISLANDS)
        words, more = ["--cluster", "c.toml"], [str(tmp_path / "c.toml")]
    arguments = [transport, str(tmp_path / "go"), *more]
    commands = [[*MOE_LAUNCH, "run", *words, "--master-port", str(port), str(tmp_path / "job.py"), *arguments]]
    if engine == "torchrun":
        commands = two_agents(tmp_path, port, *arguments)
    with job(tmp_path, commands, len(of_ranks)) as (started, said):
        found = ports(started)
        finish(tmp_path, started, said, sum(range(len(of_ranks) + 1)), len(of_ranks))
    assert sorted(map(len, found["rank"]), reverse=True) == of_ranks, found
    assert any(port in of_rank for of_rank in found["rank"]) == at_master_port, found
    assert found["agent"] == ([{port}, set()] if engine == "torchrun" else [set()]), found
    assert sorted(map(len, found["store"])) == ([0, 1] if engine == "torchrun" else []), found
    assert not any(found["other"]), found
    bridge_lines = [line for line in said().splitlines() if "bridge: " in line]
    expected = {"islands": "ranks prove the job's secret", "zeromq": "not authenticated"}.get(transport)
    assert len(bridge_lines) == (len(of_ranks) if expected else 0) and all(expected in line for line in bridge_lines)


def test_a_job_over_ssh_listens_on_its_hosts_addresses_and_turns_strangers_away(tmp_path):
    """Two hosts (network namespaces); the strangers are on the machine beside them."""
    with Hosts(tmp_path, 2) as hosts:
        (tmp_path / "hosts").write_text("".join(f"{address} slots=1 type=cpu\n" for address in hosts.addresses))
        launch = ["--engine", "ssh", hosts.ssh_args, "--hostfile", "hosts"]
        words = [*MOE_LAUNCH, "run", *launch, str(tmp_path / "job.py"), "zeromq", str(tmp_path / "go")]
        with job(tmp_path, [words], 2) as (started, said):
            name = re.search(r"job (\S+): 2 nodes", said())[1]
            secret = bytes.fromhex(records.read(name)["secret"])
            here = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cwd") if _leads_to(path, tmp_path)]
            at = [listening(process) for process in here if process != started[0].pid]
            control = (hosts.addresses[0], 29500)
            assert control in set().union(*at)
            for address in hosts.addresses:  # a rank's bridge; on the first also the controller and torchrun's store
                own = sorted(port for each in at for host, port in each if host == address)
                assert len(own) == (3 if address == control[0] else 1), at
            assert {host for each in at for host, _ in each} == set(hosts.addresses)
            relay = Relay(*control)
            link = Link(HOST, relay.port, secret)
            link.send({"kind": "status"})
            assert link.receive(5)["refused"] == {}
            attack_meanwhile(*control, relay.sent)
            link.send({"kind": "status"})
            assert sum(link.receive(5)["refused"].values()) == 11
            link.close()
            finish(tmp_path, started, said, 3.0, 2)
        assert said().count("bridge: ranks prove the job's secret") == 2


def _leads_to(path: Path, folder: Path) -> bool:
    try:
        return Path(os.readlink(path)) == folder
    except OSError:
        return False


def test_the_ranks_secret_is_a_private_file_that_goes_with_the_job(tmp_path):
    """It is another one each time the ranks start, and the agents' own is not among what ranks are told."""
    text = """
import os, stat, sys
path = os.environ["MOE_RUNTIME_JOB_SECRET_FILE"]
modes = [stat.S_IMODE(os.stat(at).st_mode) for at in (path, os.path.dirname(path))]
print("found", path, open(path).read(), *map(oct, modes), repr(os.environ.get("MOE_RUNTIME_JOB_SECRET")))
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0": os.kill(os.getpid(), 9)
"""
    (tmp_path / "job.py").write_text(text)
    seen = set()
    for more in (
        [],
        ["--engine", "torchrun", "--nnodes", "1", "--node-rank", "0", "--rdzv-endpoint", f"{HOST}:{free_port()}"],
    ):
        words = [*MOE_LAUNCH, "run", *more, "--max-restarts", "1", "job.py"]
        env = {**os.environ, environment.SECRET: TEXT, "XDG_CACHE_HOME": str(tmp_path / "cache")}
        ran = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
        assert ran.returncode == 0, ran.stderr
        found = re.findall(r"found (\S+) (\w{64}) 0o600 0o700 ''", ran.stdout)
        assert len(found) == 2, ran.stdout
        seen |= {secret for _, secret in found}
        assert not any(os.path.exists(path) for path, _ in found)
    assert len(seen) == 4


def test_mpirun_hands_the_secret_to_ranks_and_shows_it_to_nobody(tmp_path):
    if find_mpirun()[0] is None:
        pytest.skip(find_mpirun()[1])
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    (tmp_path / "go").touch()
    words = [
        *MOE_LAUNCH,
        "run",
        "--engine",
        "mpi",
        "--hostfile",
        "hosts",
        "--engine-args=--allow-run-as-root",
        "job.py",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", environment.SECRET_FILE: "/the/users/own"}
    shown = subprocess.run([*words, "zeromq", "go", "--dry-run"], cwd=tmp_path, capture_output=True, text=True, env=env)
    ran = subprocess.run([*words, "zeromq", "go"], cwd=tmp_path, capture_output=True, text=True, env=env, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("bridge: ranks prove the job's secret") == 2
    assert not re.search(r"[0-9a-f]{64}", shown.stdout + shown.stderr + ran.stderr)


def test_the_bench_of_encryption_says_what_it_found():
    words = [*MOE_LAUNCH, "bench", "bridge", "--mib", "4", "--rounds", "2", "--json"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    rates = json.loads(ran.stdout)["gb_s"]
    assert rates.keys() == {"off", "on", "tcp"} and all(len(each) == 2 and min(each) > 0 for each in rates.values())
