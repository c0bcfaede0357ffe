"""The processes of a bench's ranks: each answers a line on stdin with one JSON object on stdout, and sleeps between."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from ...core import environment
from ...core.errors import MoeRuntimeError
from ..machine import free_port

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 62)}  # see mallopt(3)


class Processes:
    """`ranks` processes of a module of this package, of `threads` threads each; one alone is no world.

    `name` is what errors call them. keep_memory: malloc of the ranks gives nothing back to the system. The first
    answer, in `ready`, comes by itself. MoeRuntimeError when one ends.
    """

    def __init__(
        self, name: str, module: str, ranks: int, threads: int, arguments: Sequence[object], keep_memory: bool = False
    ) -> None:
        self.name = name
        port = free_port()
        command = [sys.executable, "-m", f"moe_runtime.launch.bench.{module}", *map(str, arguments)]
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment.inherited(
                    (
                        environment.rank_environment(rank, ranks, rank, ranks, "127.0.0.1", port, threads)
                        if ranks > 1
                        else {}
                    )
                    | (KEEP_MEMORY if keep_memory else {})
                ),
            )
            for rank in range(ranks)
        ]
        try:
            self.ready = self._answers()
        except BaseException:
            self.close()
            raise

    def ask(self, question: str) -> list[dict[str, Any]]:
        """Every rank's answer."""
        for number, process in enumerate(self._processes):
            try:
                process.stdin.write(f"{question}\n")
                process.stdin.flush()
            except BrokenPipeError:
                self._ended(number)
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        return [self._answer(number) for number in range(len(self._processes))]

    def _answer(self, number: int) -> dict[str, Any]:
        for line in self._processes[number].stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._ended(number)

    def _ended(self, number: int) -> Any:
        code = self._processes[number].wait()
        raise MoeRuntimeError(f"bench: rank {number} of {self.name} ended (exit code {code})")

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


class Subject(Processes):
    """Ranks that are measured beside others: `description`, and of each measurement `answers` and the slowest's
    `seconds`, whose keys end in _s."""

    def __init__(
        self, name: str, module: str, ranks: int, threads: int, arguments: Sequence[object], keep_memory: bool = False
    ) -> None:
        super().__init__(name, module, ranks, threads, [name, *arguments], keep_memory)
        self.description: str = self.ready[0]["ready"]
        self.answers: list[list[dict[str, Any]]] = []
        self.seconds: list[dict[str, float]] = []

    def run(self) -> dict[str, float]:
        """One measurement."""
        answers = self.ask("run")
        self.answers.append(answers)
        self.seconds.append({key: max(a[key] for a in answers) for key in answers[0] if key.endswith("_s")})
        return self.seconds[-1]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
