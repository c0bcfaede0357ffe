"""The cluster file: which nodes there are, what each can hold and compute, how they are joined.

Pure data, read from TOML (DESIGN.md section 7). It does not look at the machine: whether a device is really there
is for whoever uses it to find out.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXPERT_DTYPES = ("fp8", "int8", "bfloat16", "float16", "float32")  # what a rank may hold experts in
_Keys = dict[str, tuple[str, Callable[[Any], bool], Callable[[Any], Any]]]


@dataclass(frozen=True)
class Node:
    """One host, or a part of it, with `devices` devices of one vendor: one rank per device.

    `speed` is the relative expert throughput of EACH device, `memory_gib` the memory of each device; None means
    not measured. `python` and `env` are the interpreter and extra variables of the node's ranks. `emulate` names a
    vendor whose device and limits a CPU node emulates; `emulate_speed` (above 0, at most 1) slows its experts down to
    that part of what they can do, so that unequal nodes can be tried on equal ones. `island` divides nodes of one
    vendor whose libraries do not reach each other: those with the same word do. `interface` is the network interface
    for traffic between nodes (None: the one that leads to the first node), `visible_devices` which devices the ranks
    may see, as the vendor's own variable says it ("0,1"). `tflops` (10^12 multiply-adds times 2 per second) and
    `memory_gb_s` (10^9 bytes of weights read per second) are what EACH device reaches, given both or neither; only
    --dry-run reads them. `expert_dtype` is what its ranks hold experts in: "fp8", "int8", or the model's dtype (None:
    as the job asks). Raises ConfigError on a value that cannot be used.
    """

    name: str
    host: str = "localhost"
    vendor: str = "auto"
    devices: int = 1
    memory_gib: float | None = None
    speed: float | None = None
    python: str | None = None
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    emulate: str | None = None
    emulate_speed: float | None = None
    island: str | None = None
    interface: str | None = None
    visible_devices: str | None = None
    tflops: float | None = None
    memory_gb_s: float | None = None
    expert_dtype: str | None = None

    def __post_init__(self) -> None:
        _check_values(self, _NODE_KEYS)
        if (self.tflops is None) != (self.memory_gb_s is None):
            raise ConfigError("tflops and memory_gb_s go together; give both, or neither")


@dataclass(frozen=True)
class Link:
    """What joins two nodes, by their names: bandwidth in Gbit/s and one-way latency in microseconds."""

    between: tuple[str, str]
    gbit_s: float
    latency_us: float

    def __post_init__(self) -> None:
        _check_values(self, _LINK_KEYS)


@dataclass(frozen=True)
class Cluster:
    """The nodes in rank order and the links between them. Raises ConfigError when they contradict each other."""

    nodes: tuple[Node, ...]
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ConfigError("no nodes; add at least one [[node]] with a name")
        names = [node.name for node in self.nodes]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f'two nodes are named "{name}"; give each node its own name')
        joined = set()
        for link in self.links:
            for name in link.between:
                if name not in names:
                    raise ConfigError(f'a link names "{name}", which is no node; the nodes are {", ".join(names)}')
            if frozenset(link.between) in joined:
                raise ConfigError(f"two links join {' and '.join(link.between)}; keep one of them")
            joined.add(frozenset(link.between))

    @property
    def num_ranks(self) -> int:
        return sum(node.devices for node in self.nodes)

    def rank_nodes(self) -> tuple[Node, ...]:
        """The node of each rank [R]: ranks follow the file's order, one per device."""
        return tuple(node for node in self.nodes for _ in range(node.devices))

    def index_in_node(self, rank: int) -> int:
        """Which of its node's devices a rank has."""
        nodes = self.rank_nodes()
        return sum(node is nodes[rank] for node in nodes[:rank])

    def rank_speeds(self) -> list[float]:
        """The relative speed of each rank [R]; all 1.0 where the file gives none.

        Raises ConfigError when only some nodes give theirs: relative numbers mean nothing beside a guess.
        """
        without = [node.name for node in self.nodes if node.speed is None]
        if without and len(without) < len(self.nodes):
            raise ConfigError(
                f"some nodes give a speed and {', '.join(without)} none; give every node a speed, or none of them"
            )
        return [1.0 if node.speed is None else node.speed for node in self.rank_nodes()]

    def digest(self) -> int:
        """A 63-bit hash of everything the cluster says, to compare between ranks."""
        text = json.dumps(asdict(self), sort_keys=True, ensure_ascii=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster file, or a hostfile with lines such as `host slots=8 type=ascend`, as DeepSpeed and MPI use them.

    Ranks follow a cluster file's order; hosts of a hostfile are put side by side by their type. Raises ConfigError, in
    one line that names file and place, when the file cannot be used.
    """
    try:
        text = Path(path).read_bytes().decode()
        if _HOST_LINE.search(text):
            cluster = _read_hostfile(text, path)
            return Cluster(_by_island(cluster.nodes))
        tables = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the cluster file ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    _refuse_unknown(tables, ("node", "link"), str(path))
    nodes = _read_tables(tables, "node", Node, _NODE_KEYS, ("name",), path)
    links = _read_tables(tables, "link", Link, _LINK_KEYS, tuple(_LINK_KEYS), path)
    try:
        return Cluster(nodes, links)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


# A line that only a hostfile has: in TOML a key is followed by its sign.
_HOST_LINE = re.compile(r"^[^\s#=\[]+[ \t]+(slots|type)=", re.MULTILINE)
_HOST = re.compile(r"(\S+)((?:\s+\w+=\S+)*)")


def _read_hostfile(text: str, path: str | Path) -> Cluster:
    """Nodes of a hostfile. The form is DeepSpeed's and Open MPI's, `type=` is FlagScale's name for the vendor."""
    nodes = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        form = _HOST.fullmatch(line)
        words = dict(word.split("=", 1) for word in form[2].split()) if form else {}
        if not form or not words.keys() <= {"slots", "type"} or not words.get("slots", "1").isdecimal():
            raise ConfigError(f'{path}: line {number}: "{line}" is not `host slots=N type=vendor`')
        try:
            nodes.append(Node(form[1], form[1], words.get("type", "auto"), int(words.get("slots", "1"))))
        except ConfigError as error:
            raise ConfigError(f"{path}: line {number}: {error}") from None
    try:
        return Cluster(tuple(nodes))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; list a host once") from None


def _by_island(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Nodes that may share a collective library side by side, kinds and nodes within them in the order given."""
    kinds = [(node.emulate or node.vendor, node.island) for node in nodes]
    first = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
    return tuple(nodes[n] for n in sorted(range(len(nodes)), key=lambda n: (first[kinds[n]], n)))


def _read_tables(
    tables: dict[str, Any], name: str, kind: type, keys: _Keys, required: tuple[str, ...], path: str | Path
) -> tuple:
    rows = tables.get(name, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: {name} must be written as [[{name}]] tables, one for each {name}")
    read = []
    for number, row in enumerate(rows, 1):
        place = f"{path}: [[{name}]] number {number}"
        if isinstance(row.get("name"), str):
            place += f' ("{row["name"]}")'
        _refuse_unknown(row, tuple(keys), place)
        missing = [key for key in required if key not in row]
        if missing:
            raise ConfigError(f"{place}: {' and '.join(missing)} missing; add {'it' if len(missing) == 1 else 'them'}")
        try:
            read.append(kind(**row))
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
    return tuple(read)


def _refuse_unknown(table: Mapping[str, object], known: tuple[str, ...], place: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}"
            raise ConfigError(f'{place}: unknown key "{key}"; {advice}')


def _check_values(instance: object, keys: _Keys) -> None:
    for key, (wanted, is_good, convert) in keys.items():
        value = getattr(instance, key)
        if value is None and key in _OPTIONAL:
            continue
        if not is_good(value):
            raise ConfigError(f"{key} = {value!r} must be {wanted}")
        object.__setattr__(instance, key, convert(value))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_text, value)) and value[0] != value[1]


def _is_text_table(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair)


# key: (what it must be, the test, how the value is kept). These are the keys a file may use, in the file's words.
_TEXT = ("a non-empty string", _is_text, str)
_POSITIVE = ("a number above 0", lambda value: _is_number(value) and value > 0, float)
_OPTIONAL = (
    "memory_gib", "speed", "python", "emulate", "emulate_speed", "island", "interface", "visible_devices",
    "tflops", "memory_gb_s",
    "expert_dtype",
)  # fmt: skip
_NODE_KEYS: _Keys = {
    "name": _TEXT,
    "host": _TEXT,
    "vendor": _TEXT,
    "devices": ("a whole number of at least 1", lambda value: type(value) is int and value >= 1, int),
    "memory_gib": _POSITIVE,
    "speed": _POSITIVE,
    "python": _TEXT,
    "env": ("a table of strings", _is_text_table, dict),
    "emulate": _TEXT,
    "emulate_speed": ("a number above 0 and at most 1", lambda value: _is_number(value) and 0 < value <= 1, float),
    "island": _TEXT,
    "interface": _TEXT,
    "visible_devices": _TEXT,
    "tflops": _POSITIVE,
    "memory_gb_s": _POSITIVE,
    "expert_dtype": (f"one of {', '.join(EXPERT_DTYPES)}", lambda value: value in EXPERT_DTYPES, str),
}
_LINK_KEYS: _Keys = {
    "between": ("a pair of different node names", _is_pair, tuple),
    "gbit_s": _POSITIVE,
    "latency_us": ("a number of at least 0", lambda value: _is_number(value) and value >= 0, float),
}
