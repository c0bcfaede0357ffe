"""What is said on the control plane: every kind of message, its fields and their types."""

from __future__ import annotations

from typing import Any

PROTOCOL = 1
MAX_BYTES = 1 << 20  # of a message
ON_LOSS = ("fail", "replica", "reload", "renormalise")  # what a user can choose to happen when a rank is lost
BEAT_S = 0.1  # between two messages of a rank

Message = dict[str, Any]
Fields = dict[str, type]

# What a coordinator is told, by kind: (fields that must be there, fields that may be).
_OF_RANK: Fields = {"rank": int, "mark": str}
_OF_HOST: Fields = {"host": str, "mark": str}
TO_COORDINATOR: dict[str, tuple[Fields, Fields]] = {
    # A rank's agent. mark: of the process, so that a later one of the same number is another one.
    "hello": ({**_OF_RANK, "host": str, "pid": int, "view": int, "members": list, "settled": bool}, {}),
    "beat": ({**_OF_RANK, "view": int, "time": float}, {"state": dict, "metrics": dict}),
    "lost": ({**_OF_RANK, "view": int, "suspects": list, "why": str, "timed_out": bool}, {"state": dict}),
    "post": ({**_OF_RANK, "view": int, "key": str, "value": bytes}, {}),
    "ready": (_OF_RANK, {}),
    "settled": ({**_OF_RANK, "view": int}, {"notes": list}),
    "drained": ({**_OF_RANK, "of": int}, {}),
    "done": (_OF_RANK, {}),
    "stacks": ({**_OF_RANK, "text": str}, {"state": dict}),
    # Who starts ranks on a host.
    "host": ({**_OF_HOST, "ranks": list}, {}),
    "exited": ({**_OF_HOST, "rank": int, "pid": int, "how": str}, {}),
    # People.
    "status": ({}, {}),
    "drain": ({"rank": int}, {}),
    "stop": ({}, {"why": str}),
}


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
        if wanted is not None and type(value) is not wanted:
            return f"a {kind} whose {name} is {type(value).__name__}, not {wanted.__name__}"
        if wanted is list and name in ("members", "suspects", "ranks") and not all(type(n) is int for n in value):
            return f"a {kind} whose {name} are not all whole numbers"
    return ""
