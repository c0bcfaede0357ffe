"""The only file that reads or writes the process environment.

Who am I (rank, world size), where do ranks meet (store address), and the few switches moe-runtime takes
from the environment. Everything else is configuration.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError


@dataclass(frozen=True)
class WorldEnvironment:
    """What the launcher said about this process.

    `launcher` is "alone", "torchrun" (moe-launch included), "mpi" or "slurm". `master_addr` and `master_port` are
    None where the launcher does not say them (mpirun); the ranks then agree on them through that launcher's own
    channel. Under srun they are MASTER_ADDR and MASTER_PORT, or else the step's first node and a port from its number.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    master_addr: str | None = None
    master_port: int | None = None
    agent_store: bool = False  # the launcher already serves a TCPStore at master_addr:master_port
    attempt: int = 0  # how often the launcher has restarted the job's ranks
    like: int | None = None  # of a rank that was added to a running job: on the node of which of the first ranks it is


# Variables that mpirun, mpiexec.hydra and srun set: (launcher, rank, size, local rank, local size).
# Sources: Open MPI 5 "Environment variables", MPICH/Intel hydra PMI, Slurm srun manual.
_OTHER_LAUNCHERS = (
    ("mpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)

_LAUNCHER_PID = "MOE_RUNTIME_LAUNCHER_PID"
OUTPUT = "MOE_RUNTIME_OUTPUT"  # a folder with the pipes that a node's ranks write to
RESTARTS = "MOE_RUNTIME_RESTARTS"  # how often a job was started again, and how often at most: "1/3"
SURVIVAL = "MOE_RUNTIME_SURVIVAL"  # the file that says where a job's coordinator is (survival.py)
LIKE = "MOE_RUNTIME_LIKE_RANK"  # WorldEnvironment.like
ENGINE_JOB = "MOE_RUNTIME_JOB"  # a job, for agents that an engine starts without a stdin of their own
SECRET = "MOE_RUNTIME_JOB_SECRET"
SECRET_FILE = "MOE_RUNTIME_JOB_SECRET_FILE"
FIRST_NODE = "MOE_RUNTIME_FIRST_NODE"  # the number of the first node of this pool of pods


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}={text!r} is not a whole number") from None


def read_world(env: Mapping[str, str] | None = None) -> WorldEnvironment:
    """Read this process's place in the job.

    Raises ConfigError when the variables are there but contradict each other (for instance RANK without
    WORLD_SIZE): a half-set environment must never fall back to a world of one.
    """
    env = os.environ if env is None else env
    port = _integer(env, "MASTER_PORT", -1)
    address = env.get("MASTER_ADDR")
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [k for k in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not env.get(k)]
        if missing:
            raise ConfigError(
                f"the environment sets some of torchrun's variables but not {', '.join(missing)}; "
                "start with moe-launch or torchrun, or unset RANK and WORLD_SIZE to run alone"
            )
        rank, size = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
        if not 0 <= rank < size:
            raise ConfigError(f"RANK={rank} is not in 0..WORLD_SIZE-1 (WORLD_SIZE={size})")
        return WorldEnvironment(
            "torchrun",
            rank,
            size,
            _integer(env, "LOCAL_RANK", rank),
            _integer(env, "LOCAL_WORLD_SIZE", size),
            address,
            port,
            agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True",
            attempt=_integer(env, "TORCHELASTIC_RESTART_COUNT", 0),
            like=_integer(env, LIKE) if env.get(LIKE) else None,
        )
    for launcher, rank_name, size_name, local_rank_name, local_size_name in _OTHER_LAUNCHERS:
        if rank_name in env and size_name in env and _integer(env, size_name) > 1:
            rank, size = _integer(env, rank_name), _integer(env, size_name)
            local_size = _integer(env, local_size_name, 1) if launcher != "slurm" else _slurm_local_size(env)
            if launcher == "slurm":
                address = address or ("127.0.0.1" if local_size == size else _slurm_first_host(env))
                port = port if port >= 0 else _slurm_port(env)
            return WorldEnvironment(
                launcher,
                rank,
                size,
                _integer(env, local_rank_name, 0),
                local_size,
                address,
                port if port >= 0 else None,
            )
    return WorldEnvironment("alone", 0, 1, 0, 1)


def _slurm_local_size(env: Mapping[str, str]) -> int:
    """How many tasks of the step run on this node. Source: srun's manual, SLURM_STEP_TASKS_PER_NODE: "2(x3),1"."""
    counts: list[int] = []
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "")
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = _integer(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else _integer(env, "SLURM_NTASKS_PER_NODE", 1)


def _slurm_first_host(env: Mapping[str, str]) -> str:
    """The node of task 0: the first of the step's list, such as "n[3-5,9],login". Source: srun's manual."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    first = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^\[,]*))?", nodes)
    if not first:
        raise ConfigError("srun said no SLURM_STEP_NODELIST; export MASTER_ADDR and MASTER_PORT, where rank 0 listens")
    return "".join(part or "" for part in first.groups())


def _slurm_port(env: Mapping[str, str]) -> int:
    """A port that all ranks of a step derive alike, and steps that run at one time differently, as far as it goes."""
    return 20000 + (_integer(env, "SLURM_JOB_ID", 0) * 16 + _integer(env, "SLURM_STEP_ID", 0)) % 10000


def rank_environment(
    rank: int, size: int, local_rank: int, local_size: int, master_addr: str, master_port: int, threads: int | None
) -> dict[str, str]:
    """torchrun's variables for one rank, to be laid over the launcher's own environment.

    `threads` is the number of compute threads of the rank, or None to leave OMP_NUM_THREADS alone.
    """
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": str(rank),
        "ROLE_NAME": "default",
        "ROLE_WORLD_SIZE": str(size),
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": str(master_port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "PYTHONUNBUFFERED": "1",
    }
    if is_loopback(master_addr):
        # Nothing may listen beyond loopback in a job of one machine: gloo otherwise binds the host's address.
        variables["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    if threads is not None and "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(threads)
    return variables


def one_more(env: Mapping[str, str], rank: int, like: int, local_rank: int) -> dict[str, str]:
    """What a rank that is added to a running job has otherwise in its environment than rank `like` beside it (env)."""
    own = {name: str(rank) for name in ("RANK", "ROLE_RANK")}
    own |= {name: str(rank + 1) for name in ("WORLD_SIZE", "ROLE_WORLD_SIZE")}
    return {
        **own,
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_rank + 1),
        LIKE: env.get(LIKE, str(like)),
    }


def inherited(extra: Mapping[str, str]) -> dict[str, str]:
    """A copy of this process's environment with `extra` laid over it, for a child process."""
    return {**os.environ, **extra}


def with_launcher_pid(env: Mapping[str, str], pid: int) -> dict[str, str]:
    """`env` with the launcher's process id in it, for take_launcher_pid in the process it is given to."""
    return {**env, _LAUNCHER_PID: str(pid)}


def take_launcher_pid() -> int | None:
    """The process id of the launcher that started this process, or None; taken out, so that no grandchild sees it."""
    text = os.environ.pop(_LAUNCHER_PID, "")
    return int(text) if text.isdigit() else None


def announce_launcher(pid: int) -> None:
    """Make `pid` the launcher of the processes that this one will start."""
    os.environ[_LAUNCHER_PID] = str(pid)


def take_output() -> tuple[str, str] | None:
    """The pipes for this rank's stdout and stderr, or None; taken out, so that no grandchild takes them for its own."""
    folder = os.environ.pop(OUTPUT, "")
    local_rank = os.environ.get("LOCAL_RANK", "")
    return (f"{folder}/{local_rank}.out", f"{folder}/{local_rank}.err") if folder and local_rank.isdigit() else None


def survival_file() -> Path | None:
    """Where the launcher wrote how to reach this job's coordinator; None for jobs without one."""
    text = os.environ.get(SURVIVAL, "")
    return Path(text) if text else None


def take_restarts() -> None:
    """Tell this rank how often the whole job was started again, in torchrun's words: its agent counts its own only."""
    count, sign, most = os.environ.pop(RESTARTS, "").partition("/")
    if sign:
        os.environ.update(TORCHELASTIC_RESTART_COUNT=count, TORCHELASTIC_MAX_RESTARTS=most)


def unless_set(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of `variables` that this process's environment does not set."""
    return {name: value for name, value in variables.items() if name not in os.environ}


def job_of_engine() -> tuple[str, int, str]:
    """The job that an engine passes in the environment, which task of it this is, and its host (Slurm's).

    Under Kubernetes the task is the pod's place in its Job (JOB_COMPLETION_INDEX; source: Kubernetes, Indexed Jobs)
    after the pools before it; torchrun would take its trainer's PET_ variables for options, so they go.
    """
    text = os.environ.pop(ENGINE_JOB, "")
    if text and FIRST_NODE in os.environ:
        for name in [name for name in os.environ if name.startswith("PET_")]:
            del os.environ[name]
        return text, _integer(os.environ, FIRST_NODE) + _integer(os.environ, "JOB_COMPLETION_INDEX"), ""
    if not text or "SLURM_NODEID" not in os.environ:
        raise ConfigError("no job and node in the environment; an agent is started by an engine of moe-launch")
    return text, _integer(os.environ, "SLURM_PROCID"), os.environ.get("SLURMD_NODENAME", "")


def job_secret() -> bytes | None:
    """The job's secret, or None where nobody handed one over.

    It comes from a file (MOE_RUNTIME_JOB_SECRET_FILE, hexadecimal, readable by this user only: what moe-launch hands to
    its ranks) or from MOE_RUNTIME_JOB_SECRET, any text, the same on all nodes. Raises ConfigError for a bad file.
    """
    path, text = os.environ.get(SECRET_FILE, ""), os.environ.get(SECRET, "")
    if not path:
        return hashlib.sha256(text.encode()).digest() if text else None
    try:
        private, secret = not os.stat(path).st_mode & 0o077, bytes.fromhex(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{SECRET_FILE}={path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ConfigError(f"{SECRET_FILE}={path}: not hexadecimal digits") from None
    if not private:
        raise ConfigError(f"{SECRET_FILE}={path}: others may read or write this file; chmod 600 {path}")
    if len(secret) < 16:
        raise ConfigError(f"{SECRET_FILE}={path}: {len(secret)} bytes are too few for a secret; give 16 or more")
    return secret


def slurm_allocation(env: Mapping[str, str] | None = None) -> tuple[str, int, int] | None:
    """Inside an allocation of Slurm: its first node, a port for it, and its number of nodes; else None."""
    env = os.environ if env is None else env
    if "SLURM_JOB_ID" not in env or "SLURM_JOB_NODELIST" not in env:
        return None
    return _slurm_first_host(env), _slurm_port(env), _integer(env, "SLURM_JOB_NUM_NODES", 1)


def address_towards(address: str, port: int) -> str:
    """The address of the interface that this machine would use to reach another; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))
        except OSError as error:
            raise ConfigError(f"no way to {address} from this host ({error}); check the address") from None
        return probe.getsockname()[0]


def keep_gloo_on_loopback() -> None:
    """Make gloo of this process listen on loopback only, unless the user named an interface."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def presized_all_to_all_bytes() -> int | None:
    """The size of Enflame's buffer for uneven all-to-all (ECCL_ALLTOALLV_MAXSIZE), or None where it is not set."""
    return _integer(os.environ, "ECCL_ALLTOALLV_MAXSIZE", -1) if "ECCL_ALLTOALLV_MAXSIZE" in os.environ else None


def user_cache_folder() -> Path:
    """Where this user keeps what can be made again: XDG_CACHE_HOME, or ~/.cache."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is to be ignored.
    return Path(named) if os.path.isabs(named) else Path.home() / ".cache"


def cxx_compiler() -> str | None:
    """The C++ compiler that the user named (CXX), as a command line, or None."""
    return os.environ.get("CXX") or None


def is_loopback(address: str) -> bool:
    """Whether a host name or address stands for this machine's loopback interface."""
    if address in ("localhost", "::1"):
        return True
    try:
        return socket.inet_aton(address)[0] == 127
    except OSError:
        return False


def vendor_marks(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables by which a vendor's software shows that it is installed (MACA_PATH: MetaX), where they are set."""
    env = os.environ if env is None else env
    return {name: env[name] for name in ("MACA_PATH",) if env.get(name)}
