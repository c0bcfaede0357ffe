"""A node's ranks in a job that survives losses: started one by one (local.py), and a keeper beside them.

torchrun's agent, which other jobs use (ranks.py), ends all ranks of a node when one is lost.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import queue
import signal
import sys
import threading
from pathlib import Path

from ..core import environment
from .control import Message
from .job import Job, log_folder, network_variables, visible_variables
from .keeper import Keeper, Survival
from .local import Ended, Rank, run_ranks
from .machine import available_cores


class SurvivingRanks:
    """The ranks of this node; what ranks.Ranks is for other jobs. Node 0's runs the coordinator.

    coordinator: its address, port and secret.
    """

    def __init__(self, job: Job, number: int, address: str, interface: str, go: Message, mark: str) -> None:
        counts: list[int] = go["devices"]
        self._first, self._count = sum(counts[:number]), counts[number]
        self._job, self._told, self._ended = job, False, list[Ended]()
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        log_dir = log_folder(job)
        survival = Survival(job.on_loss, job.silence_s, job.max_restarts, job.metrics_port, job.drain_slower_than)
        secret = hmac.digest(bytes.fromhex(job.secret), b"moe-runtime coordinator", hashlib.sha256).hex()
        self.coordinator = job.address, go["store_port"], secret
        node = job.nodes[number]
        keep = functools.partial(
            self._keeper, survival, sum(counts), go["store_port"], log_dir, secret, f"{node.name} {mark}", number == 0
        )
        self._thread = threading.Thread(
            target=self._run, args=(_ranks(job, number, interface, address, go), log_dir, keep), daemon=True
        )
        self._thread.start()

    def has_news(self) -> bool:
        """The ranks have ended, and that has not been reported yet."""
        return not self._told and bool(self._ended)

    def report(self) -> Message:
        """State of each rank, and how they ended once they have."""
        state = "ended" if self._ended else "running"
        ranks = {str(self._first + n): state for n in range(self._count)}
        if not self._ended:
            return {"ranks": ranks}
        self._told = True
        code = self._ended[0].code
        return {"ranks": ranks, "code": code, "why": "", "blames_peer": False}

    def stop(self, timeout: float) -> str:
        """SIGTERM to the ranks, SIGKILL after the job's shutdown_timeout (run_ranks says who needed it)."""
        self._events.put(signal.SIGTERM)
        self._thread.join(timeout + 15.0)
        return ""

    def _keeper(
        self,
        survival: Survival,
        size: int,
        port: int,
        log_dir: Path,
        secret: str,
        host: str,
        serves: bool,
        events: queue.SimpleQueue,
    ) -> Keeper:
        return Keeper(survival, size, self._job.address, port, log_dir, events, secret, host, serves)

    def _run(self, ranks: list[Rank], log_dir: Path, keep: functools.partial) -> None:
        job, ended = self._job, Ended(1, False)
        try:
            ended = run_ranks(
                ranks,
                log_dir,
                shutdown_timeout=job.shutdown_timeout,
                clean_stdout=job.clean_stdout,
                tee=job.tee,
                keep=keep,
                first=self._first,
                events=self._events,
            )
        finally:
            self._ended.append(ended)


def _ranks(job: Job, number: int, interface: str, address: str, go: Message) -> list[Rank]:
    counts: list[int] = go["devices"]
    node, first, size = job.nodes[number], sum(counts[:number]), sum(counts)
    threads = job.threads or max(1, available_cores() // counts[number])
    shared = {**environment.unless_set(network_variables(node, address, interface)), **visible_variables(node)}
    ranks = []
    for local in range(counts[number]):
        rank = first + local
        env = environment.rank_environment(rank, size, local, counts[number], job.address, go["store_port"], threads)
        env |= {"TORCHELASTIC_RUN_ID": job.name, "TORCHELASTIC_USE_AGENT_STORE": "False", **shared, **node.env}
        command = (node.python or sys.executable, "-m", "moe_runtime.launch.worker", *job.target)
        ranks.append(Rank(command, env, f"rank {rank}"))
    return ranks
