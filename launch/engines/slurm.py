"""Start one agent a node with srun: inside an allocation on its nodes, else srun asks for one itself.

Slurm carries the environment to the nodes and signals every task; a heterogeneous allocation is one srun over all of
its components (--het-group in --engine-args).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from ...core import environment
from ...core.errors import ConfigError
from ..job import Job


def command(job: Job, srun_args: Sequence[str]) -> list[str]:
    """The srun command for the whole job."""
    count = str(len(job.nodes))
    where = [] if any(arg.startswith("--het-group") for arg in srun_args) else ["--nodes", count, "--ntasks", count]
    agent = [job.nodes[0].python or sys.executable, "-m", "moe_runtime.launch.agent", "--from-environment"]
    # A second request of scancel's or a second Ctrl-C must still end it: agents that hang are Slurm's to kill.
    return ["srun", *where, "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--unbuffered", *srun_args, *agent]


def run(job: Job, srun_args: Sequence[str]) -> NoReturn:
    """Become srun: it takes signals itself, hands them on, and ends with the job's exit code."""
    if not shutil.which("srun"):
        raise ConfigError("--engine slurm: there is no srun on PATH; run this where Slurm's commands are")
    variables = environment.inherited({environment.ENGINE_JOB: job.to_json()})
    os.execvpe("srun", command(job, srun_args), variables)
