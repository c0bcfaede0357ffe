"""Jobs over several hosts: from the command line's options to a Job for the agents, and to their engine."""

from __future__ import annotations

import argparse
import hashlib
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..core import environment
from ..core.cluster import Cluster, Node, load_cluster
from ..core.errors import ConfigError
from . import preflight
from .agent import run_node
from .engines import k8s, mpi, slurm, ssh
from .job import Job
from .process import say

ENGINES = ("torchrun", "ssh", "slurm", "mpi", "k8s")
_PORT = 29500  # torchrun's default


def cluster_of(options: argparse.Namespace) -> Cluster:
    """The nodes of the job: the cluster file's, else as many as were asked for."""
    if not str(options.nnodes or "1").isdecimal():
        raise ConfigError(f"--nnodes {options.nnodes}: give one number; jobs do not grow or shrink")
    wanted = int(options.nnodes) if options.nnodes else None
    if options.cluster:
        cluster = load_cluster(options.cluster)
        if wanted not in (None, len(cluster.nodes)):
            raise ConfigError(f"--nnodes {wanted}: {options.cluster} has {len(cluster.nodes)} nodes; leave it out")
        if options.nproc_per_node:
            raise ConfigError(f"--nproc-per-node: {options.cluster} says how many devices each node has; leave it out")
        return cluster
    if options.engine in ("ssh", "mpi", "k8s"):
        raise ConfigError(f"--engine {options.engine}: give --cluster FILE or --hostfile FILE, which say the hosts")
    allocation = environment.slurm_allocation() if options.engine == "slurm" else None
    count = wanted or (allocation[2] if allocation else 1)
    return Cluster(tuple(Node(f"node {n}", devices=options.nproc_per_node or 1) for n in range(count)))


def make_job(
    options: argparse.Namespace, name: str, target: Sequence[str], files: Sequence[str], clean_stdout: bool
) -> Job:
    """What the agents of all nodes are told."""
    by_hand = options.engine == "torchrun"
    cluster = cluster_of(options)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    unique = name if by_hand or options.rdzv_id else f"{name}-{stamp}-{secrets.token_hex(2)}"
    if options.engine == "k8s":
        unique = name if options.rdzv_id else k8s.job_name(name)
    address, port = _meeting_point(options, cluster, unique)
    return Job(
        name=unique,
        nodes=cluster.nodes,
        address=address,
        port=port,
        secret=_secret(unique) if by_hand else secrets.token_hex(32),
        target=tuple(target),
        files=tuple(files),
        log_dir=str(Path(options.log_dir or f"runs/{name}-{stamp}").absolute()),
        clean_stdout=clean_stdout,
        threads=options.threads_per_rank,
        shutdown_timeout=options.shutdown_timeout,
        wait_s=options.start_timeout,
        engine=options.engine,
        engine_args=tuple(_engine_args(options)) if by_hand else (),
        one_terminal=options.engine in ("ssh", "slurm"),
        tee=options.tee,
        max_restarts=options.max_restarts,
        stopped_s=options.silence,
    )


def launch(options: argparse.Namespace, job: Job) -> int:
    """Start the job, or this node's part of it, and wait for its end."""
    if job.engine == "mpi":
        say("mpirun starts the ranks: no preflight, and no log files but those of its own options")
        mpi.run(job, _engine_args(options))
    if job.engine == "k8s":
        print(k8s.manifest(job, _engine_args(options)), end="")
        say(f"job {job.name}: apply this with kubectl apply -f FILE; it holds the job's secret, keep it to yourself")
        return 0
    number = node_rank(options, job.nodes) if job.engine == "torchrun" else -1
    say(f"job {job.name}: {len(job.nodes)} node{'s'[: len(job.nodes) != 1]}, logs in {job.log_dir} on each")
    if job.engine == "ssh":
        return ssh.run(job, _engine_args(options))
    if job.engine == "slurm":
        slurm.run(job, _engine_args(options))
    if environment.job_secret() is None:
        say(
            "the job's keys follow from its name only, which others may know; set MOE_RUNTIME_JOB_SECRET, the same on "
            "all nodes"
        )
    return run_node(job, number)


def commands(options: argparse.Namespace, job: Job) -> list[str]:
    """What would be run, for --dry-run; what goes over stdin or the environment is not in it."""
    if job.engine == "ssh":
        return [shlex.join(ssh.command(job, number, _engine_args(options))) for number in range(len(job.nodes))]
    if job.engine == "mpi":
        return [shlex.join(mpi.command(job, _engine_args(options)))]
    if job.engine == "k8s":
        return [k8s.manifest(replace(job, secret="(secret)"), _engine_args(options))]
    if job.engine == "slurm":
        return [shlex.join(slurm.command(job, _engine_args(options)))]
    return [f"on {node.host}: this command with --node-rank {n}" for n, node in enumerate(job.nodes)]


def node_rank(options: argparse.Namespace, nodes: Sequence[Node]) -> int:
    """--node-rank, or the one node of the cluster file whose host this is."""
    if options.node_rank is not None:
        if options.node_rank >= len(nodes):
            raise ConfigError(f"--node-rank {options.node_rank}: there are {len(nodes)} nodes, numbered from 0")
        return options.node_rank
    here = [number for number, node in enumerate(nodes) if options.cluster and preflight.is_here(node.host)]
    if len(here) != 1:
        which = "no node" if not here else "several nodes"
        raise ConfigError(f"--engine torchrun: {which} of the job can be told to be this host; give --node-rank")
    return here[0]


def _engine_args(options: argparse.Namespace) -> list[str]:
    return [word for words in options.engine_args or () for word in shlex.split(words)]


def _meeting_point(options: argparse.Namespace, cluster: Cluster, name: str) -> tuple[str, int]:
    address, port = options.master_addr, options.master_port
    if not address and options.engine == "k8s":
        address = k8s.first_address(name)
    if not address and options.cluster and (options.engine != "slurm" or cluster.nodes[0].host != "localhost"):
        address = cluster.nodes[0].host
    allocation = environment.slurm_allocation() if options.engine == "slurm" else None
    if not address and allocation:
        address, port = allocation[0], port or allocation[1]
    if not address:
        raise ConfigError("give --rdzv-endpoint HOST:PORT, where node 0 listens; nothing falls back to localhost")
    return address, port or _PORT


def _secret(name: str) -> str:
    return (environment.job_secret() or hashlib.sha256(name.encode()).digest()).hex()
