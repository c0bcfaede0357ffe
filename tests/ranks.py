"""The one multi-process test runner: a function on N ranks, each a forked process with torchrun's environment.

The first failure (or the deadline) ends every rank; the assertion shows that rank's traceback. Ranks fork from a
server that has imported torch and transformers once, so a launch costs a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from typing import Any

from moe_runtime.launch.machine import free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "transformers", "moe_runtime.runtime", "preload"])


class RankFailed(AssertionError):
    """Some rank raised, died or did not end in time."""


def run_ranks(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    expect_dead: tuple[int, ...] = (),
) -> list[Any]:
    """Call `function(*args)` on ranks 0..size-1 and return what each returned.

    `function` must be importable by name. Ranks in `expect_dead` may die without an answer (theirs is then None).
    """
    port = free_port()
    ranks = []
    for rank in range(size):
        parent, child = _context.Pipe(duplex=False)
        variables = {
            "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, **(env or {}),
        }  # fmt: skip
        process = _context.Process(target=_rank_main, args=(child, variables, function, args), daemon=True)
        process.start()
        child.close()
        ranks.append((process, parent))
    try:
        return _collect(ranks, timeout, expect_dead)
    finally:
        for process, parent in ranks:
            if process.is_alive():
                process.kill()
            process.join(10)
            parent.close()


def _collect(ranks: list, timeout: float, expect_dead: tuple[int, ...]) -> list[Any]:
    results: list[Any] = [None] * len(ranks)
    open_ranks = {parent: rank for rank, (_, parent) in enumerate(ranks)}
    deadline = time.monotonic() + timeout
    while open_ranks:
        ready = wait(list(open_ranks), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {sorted(open_ranks.values())} did not end within {timeout:g} s")
        for parent in ready:
            rank = open_ranks.pop(parent)
            try:
                kind, value = parent.recv()
            except EOFError:
                ranks[rank][0].join(5)
                if rank in expect_dead:
                    continue
                raise RankFailed(f"rank {rank} died without a word (exit code {ranks[rank][0].exitcode})") from None
            if kind == "raised":
                raise RankFailed(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return results


def _rank_main(connection: Any, variables: dict, function: Callable, args: tuple) -> None:
    os.environ.update({name: str(value) for name, value in variables.items()})
    import torch

    torch.set_num_threads(1)
    try:
        answer = ("returned", function(*args))
    except BaseException:  # noqa: BLE001 - whatever ended the rank is shown by the parent
        answer = ("raised", traceback.format_exc())
    connection.send(answer)
    connection.close()
