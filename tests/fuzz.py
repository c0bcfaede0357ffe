"""Hostile input to everything that reads what others wrote: `python tests/fuzz.py --inputs 1000000` (docs/fuzzing.md).

Each target starts from valid examples, which are changed at random: bytes, values, keys, nesting, lengths. It must
answer or refuse in its documented way, within a second, and memory must stay where it is. Anything else is a finding:
it is printed with the input that shows it, and the exit code is 1. The same seed gives the same inputs.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from moe_runtime.checkpoint import CheckpointReader
from moe_runtime.comm.bridge import read_header
from moe_runtime.comm.greeting import disagreement, read_hello
from moe_runtime.comm.messages import pack, unpack
from moe_runtime.control.agent import Agent
from moe_runtime.control.coordinator import MOST_AT_ONCE, Coordinator
from moe_runtime.control.words import problem_with
from moe_runtime.core.cluster import load_cluster
from moe_runtime.core.errors import CheckpointError, ConfigError
from moe_runtime.experts import placement, traces
from moe_runtime.launch import preflight, reach
from moe_runtime.launch.control import MESSAGE_BYTES, PROTOCOL, Controller, from_frames, to_bytes
from moe_runtime.launch.data.arrays import map_tokens
from moe_runtime.launch.generation.requests import read_requests
from moe_runtime.launch.toml import read_toml
from moe_runtime.launch.training.config import TrainConfig
from moe_runtime.state_files import Manifest

SLOWEST_S = 1.0
ROOM = 2 << 30  # bytes of address space beyond what the imports take
INTERESTING = [
    0,
    1,
    -1,
    2**31,
    2**63 - 1,
    -(2**63),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 300,
    None,
    True,
    [],
    {},
]


@dataclass
class Target:
    """examples: valid inputs. run: takes one input; may raise what `refusals` lists, and nothing else."""

    name: str
    examples: list[bytes]
    run: Callable[[bytes], None]
    refusals: tuple[type[Exception], ...]
    change: Callable[[random.Random, bytes], bytes]


# ---- changing an input ----------------------------------------------------------------------------------------------


def change_bytes(pick: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat, insert: a few times."""
    out = bytearray(data)
    for _ in range(pick.choice((1, 1, 2, 4, 16))):
        at = pick.randrange(len(out) + 1)
        kind = pick.randrange(5)
        if kind == 0 and at < len(out):
            out[at] = pick.randrange(256)
        elif kind == 1:
            del out[at : at + pick.choice((1, 2, 8, 100))]
        elif kind == 2:
            out[at:at] = out[at : at + pick.choice((1, 4, 50))]
        elif kind == 3:
            out[at:at] = pick.choice(
                (
                    b"\0" * 8,
                    b"\xff" * 8,
                    b"{" * 40,
                    b"[" * 40,
                    b'"',
                    b"\n",
                    b"9" * 30,
                    b"\x80",
                    b"[" * 5000,
                    b'{"a":' * 5000,
                )
            )
        else:
            del out[at:]
    return bytes(out[: 1 << 16])


def change_value(pick: random.Random, value: Any, depth: int = 0) -> Any:
    """A value with something in it replaced, dropped, renamed, repeated or nested."""
    kind = pick.randrange(6)
    if depth > 6 or kind == 0:
        return pick.choice(INTERESTING)
    if kind == 1:
        for _ in range(pick.choice((1, 3, 200))):
            value = [value]
        return value
    if isinstance(value, dict) and value:
        key = pick.choice(list(value))
        rest = dict(value)
        inner = rest.pop(key)
        if kind == 2:
            return rest
        if kind == 3:
            return {**rest, pick.choice((key + "x", "", "kind")) if isinstance(key, str) else "k": inner}
        return {**rest, key: change_value(pick, inner, depth + 1)}
    if isinstance(value, list) and value:
        at = pick.randrange(len(value))
        if kind == 2:
            return value[:at] + value[at + 1 :]
        if kind == 3:
            return value + [value[at]] * pick.choice((1, 50))
        return [*value[:at], change_value(pick, value[at], depth + 1), *value[at + 1 :]]
    if isinstance(value, bool) or value is None:
        return pick.choice(INTERESTING)
    if isinstance(value, (int, float)):
        return pick.choice((value + 1, -value, value * 1000, *INTERESTING))
    return value[: pick.randrange(len(value) + 1)] + "\u2028" if isinstance(value, str) else value


def as_json(pick: random.Random, data: bytes) -> bytes:
    if pick.random() < 0.4:
        return change_bytes(pick, data)
    return json.dumps(change_value(pick, json.loads(data))).encode(errors="replace")


def as_msgpack(pick: random.Random, data: bytes) -> bytes:
    if pick.random() < 0.3:
        return change_bytes(pick, data)
    try:
        return msgpack.packb(change_value(pick, msgpack.unpackb(data)))
    except OverflowError:
        return data


# ---- targets --------------------------------------------------------------------------------------------------------


def targets(folder: Path) -> list[Target]:
    made = [
        control(),
        coordinator(),
        agent(),
        *bridge(),
        cluster_file(folder),
        plan_file(folder),
        *trace_files(folder),
        *safetensors(folder),
    ]
    return [*made, manifest(folder), prompts(folder), token_array(folder), training(folder)]


def control() -> Target:
    """Messages of somebody who has the job's secret: a controller answers each, whatever is in it."""
    names = ["a", "b"]
    facts = preflight.look("127.0.0.1", None, "cpu", 1, []) | {"command": "c", "found": {}, "door": 4}
    me = {"protocol": PROTOCOL, "node": 0, "mark": "m", "host": "h"}
    examples = [
        {**me, "kind": "hello", "facts": facts},
        {**me, "kind": "hello", "node": 1, "mark": "o", "facts": {**facts, "files": {"f": "1"}}},
        {**me, "kind": "tried", "unreachable": ["x"]},
        {**me, "kind": "beat", "ranks": {"0": "running"}},
        {**me, "kind": "beat", "ranks": {}, "code": 1, "why": "w", "blames_peer": True},
        {**me, "kind": "gone"},
        {"kind": "status"},
        {"kind": "stop", "code": 143, "why": "asked"},
    ]
    jobs: list[Controller] = []

    def run(data: bytes) -> None:
        if not jobs or jobs[-1].state == "stopping":
            check = lambda facts: preflight.malformed(names, facts) or preflight.verdicts(names, facts)  # noqa: E731
            find = lambda facts: reach.targets(names, facts)  # noqa: E731
            jobs[:] = [Controller(names, check, dict, 10.0, 1.0, 0.0, True, find)]
        try:
            message = from_frames([data], MESSAGE_BYTES)
        except ValueError:
            return
        out = jobs[-1].receive(b"peer", message, 1.0) + jobs[-1].tick(2.0)
        for _, answer in out:
            to_bytes(answer)

    return Target("control messages", [msgpack.packb(example) for example in examples], run, (), as_msgpack)


def coordinator() -> Target:
    """Messages of somebody who has the job's secret, at any time of a job: a coordinator answers each, views only go
    forward, and what people are told is bounded and JSON."""
    rank = {"protocol": 1, "rank": 1, "mark": "m"}
    hello = {**rank, "kind": "hello", "host": "h", "pid": 7, "view": 0, "members": [], "pids": [], "settled": False}
    host = {"protocol": 1, "host": "h", "mark": "h"}
    examples = [
        hello,
        {**hello, "rank": 0, "mark": "n"},
        {**hello, "view": 3, "members": [0, 1], "pids": [6, 7], "settled": True, "draining": [1]},
        {**rank, "kind": "beat", "view": 1, "knows": 1, "time": 1.5, "state": {"step": 1}, "metrics": {"a": 1.0}},
        {**rank, "kind": "lost", "view": 1, "suspects": [0], "why": "w", "timed_out": True, "state": {}},
        {**rank, "kind": "post", "view": 1, "key": "who", "value": b"v", "answered": False},
        {**rank, "kind": "settled", "view": 1, "notes": ["n"]},
        *({**rank, "kind": kind} for kind in ("ready", "done")),
        {**rank, "kind": "drained", "of": 1},
        {**rank, "kind": "stacks", "text": "t", "state": {}},
        {**host, "kind": "host", "ranks": [1]},
        {**host, "kind": "exited", "rank": 1, "pid": 7, "how": "signal 9"},
        {"protocol": 1, "kind": "status"},
        {"protocol": 1, "kind": "drain", "rank": 1},
        {"protocol": 1, "kind": "grow", "ranks": 2, "like": 0},
        {"protocol": 1, "kind": "stop", "why": "w"},
    ]
    jobs: list[Coordinator] = []
    clock = [0.0]

    def run(data: bytes) -> None:
        clock[0] += 0.01
        if not jobs or jobs[-1].state == "stopping" or len(jobs[-1].ranks) > 1000:
            jobs[:] = [Coordinator(2, 3.0, clock[0], int(clock[0]) % 3)]
        try:
            message = unpack(data)
        except ValueError:
            message = None
        job = jobs[-1]
        before = job.view.number
        out = job.receive(b"peer", message, clock[0]) + job.tick(clock[0] + 0.05)
        for _, answer in out:
            pack(answer)
        assert job.view.number >= before
        json.dumps([job.events, job.reports])
        told = len(pack(job.status(clock[0])))
        assert told < 10_000 + 100_000 * len(job.ranks), told
        assert len(job._growing) <= MOST_AT_ONCE
        job.events, job.reports = [], []

    return Target("coordinator messages", [msgpack.packb(example) for example in examples], run, (), as_msgpack)


def agent() -> Target:
    """What a coordinator says: an agent takes it or drops it, and its view only goes forward."""
    heard = {"protocol": 1, "kind": "heard", "time": 0.5, "draining": [], "beat_s": 0.1}
    examples = [
        {**heard, "view": [2, [0, 1], "why", False, [6, 7]]},
        {**heard, "joins": True},
        {**heard, "stop": "over"},
        {"protocol": 1, "kind": "table", "view": 2, "key": "who", "values": [b"a", b"b"]},
        *({"protocol": 1, "kind": kind} for kind in ("again", "stacks")),
        {"protocol": 1, "kind": "refused", "why": "w"},
    ]
    agents: list[Agent] = []

    def run(data: bytes) -> None:
        if not agents or agents[-1].must_end or agents[-1].newest and agents[-1].newest.number > 1 << 30:
            agents[:] = [Agent(1, "m", "h", 7, 3.0, 0.0)]
            agents[-1].post(2, "who", b"b")
        one = agents[-1]
        before = one.newest.number if one.newest else 0
        try:
            message = unpack(data)
        except ValueError:
            return
        for answer in one.receive(message) + one.tick(1.0):
            assert problem_with({"protocol": 1, **answer}) == ""
        assert (one.newest.number if one.newest else 0) >= before and 0.0 < one._beat_s < 3.0

    return Target("agent messages", [msgpack.packb(example) for example in examples], run, (), as_msgpack)


def bridge() -> list[Target]:
    """What a rank gets on the bridge, from another rank or from somebody who says that he is one."""
    headers = [msgpack.packb(header) for header in ([7, 1 << 21, 1], [["pair", 3], 12, 0], [-1, 0, 0])]
    hello = {"protocol": 1, "rank": 2, "size": 4, "endpoint": "tcp://127.0.0.1:4000", "token": "ab" * 32, "cluster": 7}

    def greet(data: bytes) -> None:
        greeting = read_hello([data], 4)
        if greeting is not None:
            disagreement({0: {**hello, "rank": 0}, greeting["rank"]: greeting})

    frames = Target("frames of rows", headers, lambda data: read_header(data, 1) and None, (ValueError,), as_msgpack)
    return [frames, Target("greetings of ranks", [msgpack.packb(hello)], greet, (), as_msgpack)]


def file_target(
    name: str, path: Path, example: bytes, read: Callable[[Path], Any], refusals: Any, change: Any
) -> Target:
    def run(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return Target(name, [example] if isinstance(example, bytes) else example, run, refusals, change)


def cluster_file(folder: Path) -> Target:
    root = Path(__file__).parents[1] / "configs"
    examples = [
        (root / name).read_bytes() for name in ("two-hosts.toml", "seven-vendors.toml", "emulated-vendors.toml")
    ]
    examples.append(b"host-a slots=8 type=ascend\nhost-b slots=4 type=hygon\n")
    return file_target("cluster files", folder / "c.toml", examples, load_cluster, (ConfigError,), change_bytes)


def plan_file(folder: Path) -> Target:
    path = folder / "plan.json"
    placement.save_plan(placement.plan(np.arange(1.0, 17.0).reshape(2, 8), 2, 10), path)
    return file_target("plan files", path, path.read_bytes(), placement.load_plan, (ConfigError,), as_json)


def trace_files(folder: Path) -> list[Target]:
    trace = traces.LoadTrace(np.arange(24).reshape(2, 3, 4))
    traces.save(trace, folder / "t.npz")
    sglang = json.dumps({"logical_count": [[1, 2, 3], [4, 5, 6]]}).encode()
    row = {"step": 0, "layer": 0, "rank": 0, "num_tokens": 2, "topk": 2, "top_indices": [[0, 1], [2, 3]]}
    megatron = "\n".join(json.dumps({**row, "layer": layer}) for layer in (0, 1)).encode()
    read, npz = traces.read_load, (folder / "t.npz").read_bytes()
    return [
        file_target("load traces", folder / "t.npz", npz, read, (ConfigError,), change_bytes),
        file_target("SGLang traces", folder / "s.json", sglang, read, (ConfigError,), as_json),
        file_target("Megatron traces", folder / "m.jsonl", megatron,
                    lambda path: traces.read_megatron_routing([path], 4), (ConfigError,), change_bytes),
    ]  # fmt: skip


def safetensors(folder: Path) -> list[Target]:
    from safetensors.torch import save
    from torch import ones

    (model := folder / "model").mkdir()
    (model / "config.json").write_text("{}")
    names = ("model.layers.1.mlp.experts.0.up_proj.weight", "model.norm.weight")
    whole = save({name: ones(2, 3) for name in names})
    length = int.from_bytes(whole[:8], "little")

    def change(pick: random.Random, data: bytes) -> bytes:
        if pick.random() < 0.5:
            return change_bytes(pick, data)
        header = as_json(pick, data[8 : 8 + length])
        return (
            (len(header) + pick.choice((0, 0, 0, 1, -1, 2**40))).to_bytes(8, "little", signed=True)
            + header
            + whole[-48:]
        )

    def read(path: Path) -> None:
        with CheckpointReader(model) as reader:
            for key in reader.keys:
                reader.read_raw(key)

    path, refuses = model / "model.safetensors", (CheckpointError,)
    sizes = file_target(
        "safetensors, sizes", path, whole, lambda _: preflight.checkpoint_bytes(str(model)), refuses, change
    )
    return [file_target("safetensors, tensors", path, whole, read, refuses, change), sizes]


def manifest(folder: Path) -> Target:
    placed = placement.proportional(1, 4, [1.0, 1.0])
    whole = Manifest(3, 2, "AdamW", {"identity": {}}, placed, {"rank_0/a.safetensors": [5, 6]}).to_bytes()
    return file_target("manifests", folder / "manifest.json", whole, Manifest.read, (CheckpointError,), as_json)


def prompts(folder: Path) -> Target:
    lines = b'{"prompt": "a"}\n{"prompt": "b", "max_new_tokens": 3}\nnot json\n'
    path = folder / "in.jsonl"
    return file_target("prompts", path, lines, lambda path: read_requests([], path), (ConfigError,), change_bytes)


def token_array(folder: Path) -> Target:
    np.save(file := io.BytesIO(), np.arange(20, dtype=np.uint16))
    path = folder / "tokens.npy"
    return file_target("token arrays", path, file.getvalue(), map_tokens, (ConfigError,), change_bytes)


def training(folder: Path) -> Target:
    root = Path(__file__).parents[1] / "configs"
    examples = [(root / name).read_bytes() for name in ("demo.toml", "train.toml")]

    def read(path: Path) -> None:
        TrainConfig.from_table(read_toml(path), str(path))

    return file_target("training configs", folder / "train.toml", examples, read, (ConfigError,), change_bytes)


# ---- running --------------------------------------------------------------------------------------------------------


def fuzz(target: Target, inputs: int, seed: int) -> tuple[list[str], dict[str, Any]]:
    """(findings, numbers). Stops a target at its fifth finding."""
    pick = random.Random(f"{seed} {target.name}")
    findings: list[str] = []
    refused, slowest, began = 0, 0.0, time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(inputs):
        data = target.change(pick, pick.choice(target.examples))
        start = time.perf_counter()
        try:
            target.run(data)
        except target.refusals:
            refused += 1
        except Exception:  # noqa: BLE001 - whatever it is, it is a finding
            findings.append(f"{target.name}: {data[:400]!r}\n{traceback.format_exc(limit=-4)}")
        took = time.perf_counter() - start
        slowest = max(slowest, took)
        if took > SLOWEST_S:
            findings.append(f"{target.name}: {took:.1f} s for {data[:400]!r}")
        if len(findings) >= 5:
            break
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    seconds = time.perf_counter() - began
    return findings, {"refused": refused, "slowest_ms": slowest * 1e3, "grown_mib": grown, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="targets whose name has this in it")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="moe-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    everything: list[str] = []
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, in_use + ROOM))  # a number that asks for more is a finding
    try:
        chosen = [target for target in targets(folder) if not arguments.only or arguments.only in target.name]
        each = -(-arguments.inputs // len(chosen))
        print(f"{'target':<22}{'inputs':>9}{'refused':>9}{'slowest':>11}{'memory':>12}{'seconds':>9}")
        for target in chosen:
            findings, row = fuzz(target, each, arguments.seed)
            everything += findings
            told = f"  {len(findings)} FINDINGS" if findings else ""
            numbers = f"{row['slowest_ms']:>8.1f} ms{row['grown_mib']:>8.0f} MiB{row['seconds']:>9.1f}"
            print(f"{target.name:<22}{each:>9,}{row['refused']:>9,}{numbers}{told}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for finding in everything:
        print(finding, file=sys.stderr)
    return 1 if everything else 0


if __name__ == "__main__":
    sys.exit(main())
