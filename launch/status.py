"""`moe-launch status` and `moe-launch stop`: ask the controller of a job that this host has a part in."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from ..comm.locks import in_words
from ..control.client import Client
from ..core.errors import ConfigError
from . import records
from .control import Link, Message

_ANSWER_S = 5.0


def status(options: argparse.Namespace) -> int:
    """Show one job, or list those of this host. Exit code 0; 3 where the job is not running (as init scripts do)."""
    if not options.job:
        rows = [
            {key: value for key, value in row.items() if not key.endswith("secret")} for row in records.everything()
        ]
        if options.json:
            print(json.dumps({"jobs": rows}))
        for row in rows if not options.json else ():
            print(f"{row['job']}  {row['engine']}  {_state_of(row)}  logs {row['log_dir']}")
        if not rows and not options.json:
            print("no job was started on this host by this user")
        return 0
    record = records.read(options.job)
    answer = _local(record) if record["engine"] == "local" else _ask(record, {"kind": "status"})
    if answer is None:
        answer = {"state": "over" if record["code"] is not None else "lost", "code": record["code"], "nodes": []}
    if options.json:
        print(json.dumps({"job": options.job, **answer}))
    else:
        code = f", code {answer['code']}" if answer["state"] in ("stopping", "over") else ""
        print(f"{options.job}: {answer['state']}{code}")
        if refused := in_words(answer.get("refused", {})):
            print(f"  {refused}")
        for node in answer["nodes"]:
            heard = "not here yet" if node["heard_s"] is None else f"heard {node['heard_s']} s ago"
            ranks = ", ".join(f"rank {rank} {state}" for rank, state in node["ranks"].items())
            print(f"  {node['node']} (host {node['host'] or 'unknown'}): {heard}{'; ' if ranks else ''}{ranks}")
    return 0 if answer["state"] in ("running", "gathering") else 3


def stop(options: argparse.Namespace) -> int:
    """Ask a job to end, as SIGTERM to its launcher would, and wait until it has."""
    record = records.read(options.job)
    if record["engine"] == "local":
        if _local(record) is None:
            raise ConfigError(f"job {options.job} is not running")
        os.kill(record["pid"], signal.SIGTERM)
    elif _ask(record, {"kind": "stop", "code": 143, "why": "asked to stop by moe-launch stop"}) is None:
        where = f"{record['address']}:{record['port']}"
        raise ConfigError(f"job {options.job}: no answer from {where}; it has ended, or its node 0 is down")
    ends = time.monotonic() + options.timeout
    while time.monotonic() < ends:
        still = _local(record) if record["engine"] == "local" else _ask(record, {"kind": "status"}, 1.0)
        if still is None:
            print(f"{options.job}: stopped")
            return 0
        time.sleep(0.2)
    raise ConfigError(f"job {options.job}: still stopping after {options.timeout:g} s; look with moe-launch status")


def drain(options: argparse.Namespace) -> int:
    """Have a rank leave a running job without losing work: its experts move to others, then its sequences."""
    record = records.read(options.job)
    _order(record, {"kind": "drain", "rank": options.rank})
    ends = time.monotonic() + options.timeout
    while time.monotonic() < ends:
        status = ask_coordinator(record, {"kind": "status"})
        if options.rank not in status["members"]:
            print(f"{options.job}: rank {options.rank} has left; view {status['view']}: ranks {status['members']}")
            return 0
        time.sleep(0.2)
    raise ConfigError(
        f"job {options.job}: rank {options.rank} is still in after {options.timeout:g} s; it goes on leaving"
    )


def grow(options: argparse.Namespace) -> int:
    """Have a running job start more ranks, and wait until they have joined."""
    record = records.read(options.job)
    like = {} if options.like is None else {"like": options.like}
    answer = _order(record, {"kind": "grow", "ranks": options.ranks, **like})
    told, ends = ", ".join(map(str, answer["ranks"])), time.monotonic() + options.timeout
    while time.monotonic() < ends:
        status = ask_coordinator(record, {"kind": "status"})
        if set(answer["ranks"]) <= set(status["members"]):
            print(f"{options.job}: joined: {told}; view {status['view']}: ranks {status['members']}")
            return 0
        for rank in status["ranks"]:
            if rank["rank"] in answer["ranks"] and rank["state"] == "ended":
                number, logs = rank["rank"], record["log_dir"]
                raise ConfigError(f"job {options.job}: rank {number} has ended; look at rank_{number}.log in {logs}")
        time.sleep(0.2)
    raise ConfigError(
        f"job {options.job}: not all of the ranks {told} are in after {options.timeout:g} s; they go on joining"
    )


def _order(record: dict[str, Any], message: Message) -> Message:
    """ask_coordinator for what it may refuse: raises ConfigError then, too."""
    answer = ask_coordinator(record, message)
    if answer["kind"] == "refused":
        raise ConfigError(f"job {record['job']}: {answer['why']}")
    return answer


def client_of(record: dict[str, Any]) -> Client:
    """A way to the coordinator that records.coordinator has written down."""
    return Client(*record["coordinator"], bytes.fromhex(record["coordinator_secret"]))


def ask_coordinator(record: dict[str, Any], message: Message, seconds: float = _ANSWER_S) -> Message:
    """The answer of the coordinator of a job that survives losses. Raises ConfigError where there is none."""
    if "coordinator" not in record:
        raise ConfigError(f"job {record['job']} has no coordinator: it was started without --on-loss")
    address, port = record["coordinator"]
    client = client_of(record)
    try:
        answer = client.ask(message, seconds)
    finally:
        client.close()
    if answer is None:
        raise ConfigError(f"job {record['job']}: no answer from its coordinator at {address}:{port}; has it ended?")
    return answer


def _state_of(row: dict[str, Any]) -> str:
    return "not ended here" if row["code"] is None else f"ended with {row['code']}"


def _local(record: dict[str, Any]) -> Message | None:
    """A job of the local engine, if its launcher still lives: the process of that number must have started before."""
    proc = Path(f"/proc/{record['pid']}")
    if record["code"] is not None or not proc.is_dir() or proc.stat().st_mtime > record["started"] + 60:
        return None
    return {"state": "running", "code": 0, "nodes": []}


def _ask(record: dict[str, Any], message: Message, seconds: float = _ANSWER_S) -> Message | None:
    link = Link(record["address"], record["port"], bytes.fromhex(record["secret"]))
    try:
        link.send(message)
        return link.receive(seconds)
    finally:
        link.close()
