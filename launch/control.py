"""How the agents of a job's nodes agree: who is here, whether all fit together, when to start, and why to stop.

`Controller` decides and touches no socket: messages in, messages out, the time as an argument. It lives beside node 0;
`serve` gives it a socket there and `Link` is an agent's or a client's end. Every agent sends one short message a
`BEAT_S` and gets one back, so traffic grows with the number of nodes and not with its square. Connections are CURVE's,
by keys that follow from the job's secret (comm/locks.py): who has not got it is not let in, and counted.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..comm.locks import Doorkeeper, calls, job_keys, listens, set_bounds
from ..comm.messages import open_socket, pack, unpack, zmq
from ..core.errors import ConfigError
from .machine import allow_open_files
from .worker import USER_ERROR_CODE

PROTOCOL = 1
BEAT_S = 0.5
SILENCE_S = 15.0  # without a message for so long, the other side is taken for lost
TRYING_S = 30.0  # for all nodes to have tried the ways to each other (reach.PATIENCE_S each)
MESSAGE_BYTES = 1 << 20  # of a message to a controller
ANSWER_BYTES = 1 << 24  # of one from it, which may tell of all nodes
MESSAGE_ITEMS = 1 << 18
FIRST_FAILURE_S = 1.0  # ranks that lost a peer often fail before the news of the peer itself is here

Message = dict[str, Any]
Out = list[tuple[bytes, Message]]

# What a controller is told, by kind: (fields that must be there, fields that may be), each of one type.
_OF_NODE = {"node": int, "mark": str}
_KINDS: dict[str, tuple[dict[str, type], dict[str, type]]] = {
    "status": ({}, {}),
    "stop": ({}, {"code": int, "why": str}),
    "hello": ({**_OF_NODE, "host": str, "facts": dict}, {}),
    "tried": ({**_OF_NODE, "unreachable": list}, {"host": str}),
    "beat": (_OF_NODE, {"ranks": dict, "code": int, "why": str, "blames_peer": bool}),
    "gone": (_OF_NODE, {}),
}
_MAX_CODE = 255


def not_understood(message: Message) -> str:
    """What is wrong with a message to a controller, or ""."""
    kind = message.get("kind")
    if message.get("protocol", PROTOCOL) != PROTOCOL:
        other = f"{message['protocol']!r:.40}"
        return f"it speaks protocol {other}, node 0 speaks {PROTOCOL}; install the same moe-runtime on both"
    if not isinstance(kind, str) or kind not in _KINDS:
        return f"a message that is not understood: {kind!r:.40}"
    needed, optional = _KINDS[kind]
    for name, value in message.items():
        wanted = needed.get(name) or optional.get(name)
        if wanted is not None and type(value) is not wanted:
            return f"a {kind} whose {name} is {type(value).__name__}, not {wanted.__name__}"
    missing = next((name for name in needed if name not in message), None)
    return f"a {kind} without {missing}" if missing else ""


@dataclass
class _Node:
    name: str
    sender: bytes = b""
    start_mark: str = ""  # of the agent that speaks for this node: two agents with one number are a mistake
    facts: Mapping[str, Any] = field(default_factory=dict)
    heard: float = 0.0
    ranks: Mapping[str, str] = field(default_factory=dict)
    unreachable: list[str] | None = None  # what this node could not connect to, once it has tried
    ended: bool = False
    gone: bool = False


class Controller:
    """One job's membership and life. names[i]: the node that number i stands for.

    check(facts of all nodes) returns what does not fit together, one line for each; with any line nothing starts.
    targets(facts of all nodes) says whom each node is to connect to before anything starts (reach.py).
    survives: a node that is not heard of is left to the coordinator of the ranks (moe_runtime/control), which goes on
    without its ranks. may_restart: a rank's failure, other than a user's mistake, tells the agents to begin again.
    """

    def __init__(
        self,
        names: list[str],
        check: Callable[[list[Mapping[str, Any]]], list[str]],
        start: Callable[[], Message],
        wait_s: float,
        shutdown_s: float,
        now: float,
        may_restart: bool = False,
        targets: Callable[[list[Mapping[str, Any]]], list[list[Any]]] = lambda facts: [],
        survives: bool = False,
    ) -> None:
        self._nodes = [_Node(name) for name in names]
        self._check, self._start, self._find_targets = check, start, targets
        self._targets: list[list[Any]] = []
        self._wait_s, self._shutdown_s = wait_s, shutdown_s
        self._began, self._here = now, 0
        self.state = "gathering"
        self.code, self.why, self.restart = 0, "", False
        self.refused: Counter[str] = Counter()  # messages, by reason
        self._may_restart, self._survives = may_restart, survives
        self._failures: list[tuple[bool, int, str]] = []
        self._since = now  # of the present state, or of the first failure

    def receive(self, sender: bytes, message: Message, now: float) -> Out:
        """Answer one message."""
        problem = not_understood(message)
        if problem:
            other = message.get("protocol", PROTOCOL) != PROTOCOL
            self.refused["messages of another version" if other else "messages not understood"] += 1
            return [(sender, {"kind": "refuse", "code": 2, "why": problem})]
        kind = message["kind"]
        if kind == "status":
            return [(sender, self.status(now))]
        if kind == "stop":
            self._stop(_as_code(message.get("code", 143)), message.get("why", "asked to stop"), now)
            return [(sender, {"kind": "stopping"}), *self._to_all()]
        number = message["node"]
        if not 0 <= number < len(self._nodes):
            why = f"node rank {number} is not in 0..{len(self._nodes) - 1}: --nnodes and --node-rank do not fit"
            return [(sender, {"kind": "refuse", "code": 2, "why": why})]
        node = self._nodes[number]
        if node.start_mark and message.get("mark") != node.start_mark:
            other = node.facts.get("host", "?")
            why = (
                f"two nodes have node rank {number} ({node.name}): {other} and {message.get('host', '?')}; "
                "give each its own --node-rank"
            )
            self._stop(2, why, now)
            return [(sender, {"kind": "refuse", "code": 2, "why": why}), *self._to_all()]
        node.sender, node.heard = sender, now
        if kind == "hello" and self.state == "gathering":
            self._here += not node.start_mark
            node.start_mark, node.facts = message["mark"], message["facts"]
            return self._gathered(now) if self._here == len(self._nodes) else [(sender, self._order(number))]
        if kind == "tried" and self.state == "trying":
            node.unreachable = [str(line) for line in message["unreachable"]]
            if all(n.unreachable is not None for n in self._nodes):
                return self._tried(now)
        if kind == "gone":
            node.gone = True
        if kind == "beat":
            node.ranks = message.get("ranks", {})
            node.ended = node.ended or message.get("code") is not None
            if message.get("code") and self.state == "running":
                if not self._failures:
                    self._since = now
                failure = (message.get("blames_peer", False), _as_code(message["code"]), message.get("why", ""))
                if failure not in self._failures:
                    self._failures.append(failure)
        return [(sender, self._order(number))]

    def tick(self, now: float) -> Out:
        """What has to be said because time has passed."""
        if self.state == "gathering" and now - self._began > self._wait_s:
            missing = [node.name for node in self._nodes if not node.start_mark]
            here = [node.name for node in self._nodes if node.start_mark]
            self._stop(
                2,
                f"waited {self._wait_s:g} s for {', '.join(missing)}; here: {', '.join(here)}. Is it up, was the job "
                "started there, and does a firewall let it reach this port?",
                now,
            )
            return self._to_all()
        if self.state == "trying" and now - self._since > TRYING_S:
            silent = ", ".join(node.name for node in self._nodes if node.unreachable is None)
            why = f"waited {TRYING_S:g} s for {silent} to try the ways to other nodes; is the host very slow, or gone?"
            self._stop(2, why, now)
            return self._to_all()
        if self.state != "running":
            return []
        silent = [n for n in self._nodes if not n.gone and now - n.heard > SILENCE_S]
        if silent and self._survives:
            for node in silent:
                node.gone = node.ended = True
        elif silent:
            for node in silent:
                node.gone = True  # nobody waits for them
            self._stop(1, f"{silent[0].name} has not been heard of for {SILENCE_S:g} s: host or network is down", now)
        elif self._failures:
            blames, code, why = min(self._failures, key=lambda failure: failure[0])
            if blames and now - self._since <= FIRST_FAILURE_S:
                return []
            self.restart = self._may_restart and code != USER_ERROR_CODE
            self._stop(code, why, now)
        elif all(node.ended for node in self._nodes):
            self._stop(0, "", now)
        else:
            return []
        return self._to_all()

    def is_over(self, now: float) -> bool:
        """Nobody is left to talk to."""
        waited = now - self._since > self._shutdown_s + 5.0
        return self.state == "stopping" and (waited or all(n.gone or not n.start_mark for n in self._nodes))

    def status(self, now: float) -> Message:
        """What `moe-launch status` shows."""
        nodes = [
            {
                "node": node.name,
                "host": node.facts.get("host", ""),
                "heard_s": round(now - node.heard, 1) if node.start_mark else None,
                "ranks": dict(node.ranks),
            }
            for node in self._nodes
        ]
        told = {"state": self.state, "code": self.code, "why": self.why, "refused": dict(self.refused)}
        return {"kind": "status", **told, "nodes": nodes}

    def _gathered(self, now: float) -> Out:
        problems = self._check([node.facts for node in self._nodes])
        if problems:
            self._stop(2, "\n".join(problems), now)
            return self._to_all()
        self._targets = self._find_targets([node.facts for node in self._nodes])
        if not any(self._targets):
            return self._tried(now)
        self.state, self._since = "trying", now
        return self._to_all()

    def _tried(self, now: float) -> Out:
        unreachable = [line for node in self._nodes for line in node.unreachable or ()]
        if unreachable:
            self._stop(2, "\n".join(unreachable), now)
        else:
            self.state, self._since, self._go = "running", now, {"kind": "go", **self._start()}
            for node in self._nodes:
                node.heard = now
        return self._to_all()

    def _order(self, number: int) -> Message:
        if self.state == "gathering":
            missing = (node.name for node in self._nodes if not node.start_mark)
            return {"kind": "wait", "missing": list(itertools.islice(missing, 5))}  # all names to all were a square
        if self.state == "trying":
            return {"kind": "try", "targets": self._targets[number]}
        if self.state == "running":
            return self._go
        return {"kind": "stop", "code": self.code, "why": self.why, "restart": self.restart}

    def _to_all(self) -> Out:
        return [(node.sender, self._order(n)) for n, node in enumerate(self._nodes) if node.start_mark]

    def _stop(self, code: int, why: str, now: float) -> None:
        if self.state != "stopping":
            self.state, self.code, self.why, self._since = "stopping", code, why, now


def _as_code(code: int) -> int:
    """An exit code that is none becomes 1."""
    return code if 0 <= code <= _MAX_CODE else 1


def to_bytes(message: Message) -> bytes:
    """A message as it travels."""
    return pack({"protocol": PROTOCOL, **message})


def from_frames(frames: list[bytes], most: int) -> Message:
    """The message of one frame of at most `most` bytes. Raises ValueError saying, for a count, what this is instead."""
    if len(frames) == 1 and len(frames[0]) > most:
        raise ValueError("messages that were too large")
    try:
        message = unpack(b"".join(frames), most, MESSAGE_ITEMS)
    except ValueError:
        message = None
    if not isinstance(message, dict) or len(frames) != 1:
        raise ValueError("messages that were none")
    return message


def serve(controller: Controller, address: str, port: int, secret: bytes) -> threading.Thread:
    """Run a controller at address:port until its job is over. Raises ConfigError where the address cannot be used."""
    allow_open_files()
    keys, context = job_keys(secret), zmq.Context()
    door, keeper = open_socket(context, zmq.ROUTER), Doorkeeper(context, keys)
    listens(door, keys)
    set_bounds(door, 2 * MESSAGE_BYTES)  # beyond this ZeroMQ ends the connection without a word; up to it we count
    keeper.watch(door)
    try:
        door.bind(f"tcp://{address}:{port}")
    except zmq.ZMQError as error:
        keeper.close()
        context.destroy(linger=0)
        raise ConfigError(
            f"node 0 cannot listen at {address}:{port} ({error}); is another job there? "
            "Give another --master-port, or check that the address is one of this host"
        ) from error

    def answers(sender: bytes, frames: list[bytes], now: float) -> Out:
        try:
            return controller.receive(sender, from_frames(frames, MESSAGE_BYTES), now)
        except ValueError as what:
            controller.refused[str(what)] += 1
            return []

    def run() -> None:
        ticked, over = 0.0, False
        while not over:
            out: Out = []
            got = door.poll(50)
            now = time.monotonic()
            if got:
                sender, *frames = door.recv_multipart()
                out += answers(sender, frames, now)
            if now - ticked >= 0.05:  # it looks at all nodes: not for each message
                ticked = now
                out += controller.tick(now)
                over = controller.is_over(now)
            for sender, message in out:
                if message["kind"] == "status":
                    message["refused"] = {**keeper.refused, **message["refused"]}
                door.send_multipart([sender, to_bytes(message)])
        keeper.close()
        door.close(linger=1000)
        context.term()

    thread = threading.Thread(target=run, name="controller", daemon=True)
    thread.start()
    return thread


class Link:
    """An end that talks to the controller at address:port."""

    def __init__(self, address: str, port: int, secret: bytes) -> None:
        self._context = zmq.Context()
        self._socket = open_socket(self._context, zmq.DEALER)
        self._socket.reconnect_ivl_max = 2000  # ms; where the secret is another one it is turned away each time
        self._socket.maxmsgsize = ANSWER_BYTES
        calls(self._socket, job_keys(secret))
        self._socket.connect(f"tcp://{address}:{port}")

    def send(self, message: Message) -> None:
        self._socket.send(to_bytes(message))

    def receive(self, seconds: float) -> Message | None:
        """The next message, or None when none came in time."""
        if not self._socket.poll(seconds * 1000):
            return None
        try:
            return from_frames(self._socket.recv_multipart(), ANSWER_BYTES)
        except ValueError:  # node 0 is of another version, or broken: the silence has a deadline
            return None

    def close(self) -> None:
        self._socket.close(linger=500)
        self._context.term()
