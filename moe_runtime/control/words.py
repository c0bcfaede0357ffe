"""What is said on the control plane: every kind of message, its fields and their types."""

from __future__ import annotations

from typing import Any

PROTOCOL = 1
_MOST = 256
MAX_BYTES = 1 << 20  # of a message
MAX_STACKS = 1 << 16  # characters of one process's stacks
ON_LOSS = ("fail", "replica", "reload", "renormalise")  # what a user can choose to happen when a rank is lost
BEAT_S = 0.1  # between two messages of a rank, and of who starts ranks
LEASE = 0.7  # of silence_s: a rank whose messages have not been answered for so long ends
OVER = "the job has ended"  # what a rank is told to stop for, where nothing is wrong
_LARGEST = 1 << 31  # of a whole number in a message: views, ranks, process ids

Message = dict[str, Any]
Fields = dict[str, type]

# What a coordinator is told, by kind: (fields that must be there, fields that may be).
_OF_RANK: Fields = {"rank": int, "mark": str}
_OF_HOST: Fields = {"host": str, "mark": str}
TO_COORDINATOR: dict[str, tuple[Fields, Fields]] = {
    # A rank's agent. mark: of the process, so that a later one of the same number is another one.
    # view, members, pids: the newest view it has heard of, 0 before the first; settled: it works in that one.
    "hello": (
        {**_OF_RANK, "host": str, "pid": int, "view": int, "members": list, "pids": list, "settled": bool},
        {"draining": list},
    ),
    # view: the one it works in. knows: the newest it has heard of.
    "beat": ({**_OF_RANK, "view": int, "knows": int, "time": float}, {"state": dict, "metrics": dict}),
    "lost": ({**_OF_RANK, "view": int, "suspects": list, "why": str, "timed_out": bool}, {"state": dict}),
    # answered: it has the table already, and says this for a coordinator that was started again.
    "post": ({**_OF_RANK, "view": int, "key": str, "value": bytes}, {"answered": bool}),
    "ready": (_OF_RANK, {}),
    "settled": ({**_OF_RANK, "view": int}, {"notes": list}),
    "drained": ({**_OF_RANK, "of": int}, {}),
    "done": (_OF_RANK, {}),
    "stacks": ({**_OF_RANK, "text": str}, {"state": dict}),
    # Who starts ranks on a host. ranks: numbers of all that it has started.
    "host": ({**_OF_HOST, "ranks": list}, {}),
    "exited": ({**_OF_HOST, "rank": int, "pid": int, "how": str}, {}),
    # People.
    "status": ({}, {}),
    "drain": ({"rank": int}, {}),
    "grow": ({"ranks": int}, {"like": int}),  # start more ranks, beside rank `like`
    "stop": ({}, {"why": str}),
}
# What a rank's agent is told. view: [number, members, why, at_boundary, pids]. beat_s: how often to beat.
TO_RANK: dict[str, tuple[Fields, Fields]] = {
    "heard": (
        {"time": float},
        {"view": list, "draining": list, "joins": bool, "stop": str, "beat_s": float},
    ),
    "table": ({"view": int, "key": str, "values": list}, {}),
    "again": ({}, {}),
    "refused": ({"why": str}, {}),
    "stacks": ({}, {}),
}
_NUMBERS = ("members", "suspects", "ranks", "pids", "draining")  # lists of whole numbers


def problem_with(message: Any, kinds: dict[str, tuple[Fields, Fields]] = TO_COORDINATOR) -> str:
    """What is wrong with a message, or "". Fields that are not named may be there: a later version's."""
    if not isinstance(message, dict):
        return "a message that is no map"
    if message.get("protocol") != PROTOCOL:
        other = f"{message.get('protocol')!r:.40}"
        return f"it speaks protocol {other}, this job speaks {PROTOCOL}; install the same moe-runtime on both"
    kind = message.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        return f"a message that is not understood: {kind!r:.40}"
    needed, optional = kinds[kind]
    missing = next((name for name in needed if name not in message), None)
    if missing:
        return f"a {kind} without {missing}"
    for name, value in message.items():
        wanted = needed.get(name) or optional.get(name)
        if wanted is None:
            continue
        if type(value) is not wanted:
            return f"a {kind} whose {name} is {type(value).__name__}, not {wanted.__name__}"
        if wanted is int and not 0 <= value < _LARGEST:
            return f"a {kind} whose {name} is out of range"
        if wanted is float and not 0.0 <= value < _LARGEST:  # not a number neither
            return f"a {kind} whose {name} is out of range"
        if wanted is list and name in _NUMBERS and not _are_numbers(value):
            return f"a {kind} whose {name} are not all whole numbers in range"
    if kind == "hello" and len(message["members"]) != len(message["pids"]):
        return "a hello whose members and pids differ in number"
    return ""


def _are_numbers(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < _LARGEST for value in values)


def view_of(told: list[Any]) -> tuple[int, tuple[int, ...], str, bool, tuple[int, ...]] | None:
    """A view as it is told to ranks, or None where it is none."""
    if [type(part) for part in told] != [int, list, str, bool, list] or not _are_numbers([told[0], *told[1], *told[4]]):
        return None
    number, members, why, at_boundary, pids = told
    return (number, tuple(members), why, at_boundary, tuple(pids)) if len(members) == len(pids) else None


def bounded(table: dict[Any, Any]) -> dict[str, Any]:
    """What a rank says of itself, as far as people can be shown it: short names, numbers and short texts; lists of
    numbers, and numbers by number (such as seconds by peer), _MOST of them at most."""
    short: dict[str, Any] = {}
    for name, value in list(table.items())[:32]:
        if isinstance(value, str):
            value = value[:200]
        elif isinstance(value, list):
            value = [item for item in value[:_MOST] if isinstance(item, (int, float))]
        elif isinstance(value, dict):
            value = {k: v for k, v in list(value.items())[:_MOST] if isinstance(k, int) and isinstance(v, (int, float))}
        if isinstance(name, str) and (value is None or isinstance(value, (bool, int, float, str, list, dict))):
            short[name[:60]] = value
    return short
