"""A job over several hosts, as all its agents are told it, and the variables that a node's ranks get."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..comm.vendors import VENDORS
from ..core import environment
from ..core.cluster import Node
from ..core.errors import ConfigError


@dataclass(frozen=True)
class Job:
    """What all agents of a job are told alike. nodes: in rank order; address, port: where node 0's controller listens.

    target: the worker's arguments. files: what every node must have, the same. wait_s: for all nodes to come.
    max_restarts: how often all ranks are started again after one failed; attempt: how often they were. on_loss: "fail",
    or how the job goes on without ranks that are lost (words.ON_LOSS); lost ranks are then started again alone.
    silence_s: how long a rank may be silent, or stopped where there are restarts. metrics_port, drain_slower_than: see
    control/server.py. one_terminal: all agents write to one place, so only node 0 tells what concerns the whole job.
    tee: see is_shown.
    """

    name: str
    nodes: tuple[Node, ...]
    address: str
    port: int
    secret: str
    target: tuple[str, ...]
    files: tuple[str, ...]
    log_dir: str
    clean_stdout: bool = False
    threads: int | None = None
    shutdown_timeout: float = 10.0
    wait_s: float = 120.0
    engine: str = "torchrun"
    engine_args: tuple[str, ...] = ()
    one_terminal: bool = False
    tee: str | None = None
    max_restarts: int = 0
    attempt: int = 0
    on_loss: str = "fail"
    silence_s: float = 3.0
    metrics_port: int = 0
    drain_slower_than: float = 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        """Raises ConfigError for anything that is not a job."""
        try:
            table = json.loads(text)
            lists = {key: tuple(value) for key, value in table.items() if isinstance(value, list)}
            return Job(**{**table, **lists, "nodes": tuple(Node(**node) for node in table["nodes"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"this is no job of moe-launch's ({error}); an agent is started by an engine") from None


def next_attempt(job: Job) -> Job:
    """The job begun again. Its messages have a key of their own: what is still on its way from before is dropped."""
    secret = hashlib.sha256(bytes.fromhex(job.secret) + b"again").hexdigest()
    return replace(job, secret=secret, attempt=job.attempt + 1)


def ranks_secret(job: Job) -> str:
    """What this attempt's ranks share, in hexadecimal. With it nobody can speak as an agent."""
    return hmac.digest(bytes.fromhex(job.secret), b"moe-runtime ranks", hashlib.sha256).hex()


def secret_file(folder: Path, secret: str) -> dict[str, str]:
    """Write what ranks share into a private folder; the variables that tell them where it is, and nothing else."""
    path = folder / "secret"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secret)
    return {environment.SECRET_FILE: str(path), environment.SECRET: ""}


def log_folder(job: Job) -> Path:
    """The job's folder of logs, which is there from now on. Raises ConfigError where this host cannot make it."""
    folder = Path(job.log_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--log-dir {job.log_dir}: {error.strerror} here; name a folder of every host") from None
    return folder


def network_variables(node: Node, address: str, interface: str) -> dict[str, str]:
    """The vendor's variables that say which interface to use: HCCL_IF_IP takes an address, all others a name."""
    row = VENDORS.get(node.vendor)
    named = {"GLOO_SOCKET_IFNAME"} | {name for name in (row.network_variables.value if row else ())}
    variables = {name: interface for name in named if name.endswith("_SOCKET_IFNAME") and interface}
    return variables | ({"HCCL_IF_IP": address} if "HCCL_IF_IP" in named else {})


def visible_variables(node: Node) -> dict[str, str]:
    """The vendor's variable that says which devices the node's ranks may see."""
    if node.visible_devices is None:
        return {}
    row = VENDORS.get(node.vendor)
    names = row.visible_devices.value if row else None
    if not isinstance(names, tuple):
        raise ConfigError(f"{node.name}: visible_devices: vendor {node.vendor} has no variable for it; use env")
    return {names[0]: node.visible_devices}
