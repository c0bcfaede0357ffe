"""torchrun's agent as a child of a node's agent: `python -m moe_runtime.launch.elastic FILE [torchrun's arguments]`.

It is torch.distributed.run, called so that the failures it collects (which rank, which exit code) are written to FILE
as JSON instead of being printed, and so that the ranks die with it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from ..core.environment import announce_launcher
from .worker import die_with_launcher


def main() -> int:
    die_with_launcher()
    report, arguments = Path(sys.argv[1]), sys.argv[2:]
    announce_launcher(os.getpid())
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    given = parse_args(arguments)
    config, command, command_arguments = config_from_args(given)
    store = _store(given) if given.node_rank == 0 else None  # held until the ranks have ended
    try:
        elastic_launch(config, command)(*command_arguments)
    except ChildFailedError as error:
        failed = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        rows = [[rank, failure.exitcode] for rank, failure in failed]
        report.with_suffix(".tmp").write_text(json.dumps(rows))
        os.replace(report.with_suffix(".tmp"), report)
        return 1
    except SignalException:
        return 0  # the node's agent asked for it
    del store
    return 0


def _store(given: Any) -> Any:
    """torchrun's store, on the job's address alone. torch would listen on every interface, but uses one it finds."""
    import torch.distributed as dist

    from ..comm.group import listen

    listener = listen(given.master_addr, given.master_port)
    return dist.TCPStore(
        given.master_addr,
        given.master_port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


if __name__ == "__main__":
    sys.exit(main())
