"""How moe-launch's options are read: both spellings, checked values, and the launch options that jobs share."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from ..control.words import ON_LOSS
from ..core.errors import ConfigError


def add_launch_options(group: Any) -> None:
    at_least_1, count = whole_number(1), whole_number(0)
    of_cluster = "number of ranks (default: the cluster file's, else 1)"
    add(group, "--nproc-per-node", type=at_least_1, metavar="N", help=of_cluster)
    add(group, "--nnodes", metavar="N", help="number of hosts (default: the cluster file's, Slurm's, else 1)")
    of_host = "this host's number, for torchrun (default: found in the cluster file)"
    add(group, "--node-rank", type=count, metavar="N", help=of_host)
    add(group, "--cluster", metavar="FILE", help="cluster file: the nodes, their devices and speeds")
    lines = "the same as --cluster, for lines such as `host slots=8 type=ascend`"
    group.add_argument("-H", "--hostfile", dest="cluster", metavar="FILE", default=argparse.SUPPRESS, help=lines)
    engines = "local (one host), torchrun (call it on every host), ssh, slurm or mpi (call it once), k8s (prints YAML)"
    add(group, "--engine", metavar="NAME", help=engines)
    passed = "the engine's own options, such as --engine-args='--partition=gpu' (repeatable)"
    add(group, "--engine-args", action="append", metavar="WORDS", help=passed)
    add(group, "--master-addr", metavar="HOST", help="where node 0 listens (default: its host; one host: 127.0.0.1)")
    of_port = "its port (default: 29500; one host: a free one)"
    add(group, "--master-port", type=whole_number(1, 65535), metavar="PORT", help=of_port)
    wait = "for all nodes to come (default: 120)"
    add(group, "--start-timeout", type=seconds, default=120.0, metavar="SECONDS", help=wait)
    add(group, "--rdzv-endpoint", type=_endpoint, metavar="HOST:PORT", help="both in one")
    add(group, "--rdzv-id", metavar="NAME", help="name of the job (default: from SCRIPT or the command)")
    add(group, "--log-dir", metavar="DIR", help="for rank_N.log (default: runs/<job>-<time>-<pid>)")
    shown = "what is shown, not only logged: 1 stdout, 2 stderr, 3 both (default), 0 none, or by rank: 0:3,2:1"
    add(group, "-t", "--tee", type=_streams, metavar="WHICH", help=shown)
    again = "start all ranks again, at most N times, when one fails; they take up what they saved (default: 0)"
    add(group, "--max-restarts", type=count, default=0, metavar="N", help=again)
    lost = (
        "when a rank is lost: fail; or go on with the others, its experts from their replicas (replica), read from the "
    )
    lost += "checkpoint again (reload), or left out (renormalise: other results, said). --max-restarts then starts the "
    lost += "lost ranks alone again (default: fail)"
    add(group, "--on-loss", choices=ON_LOSS, default="fail", help=lost)
    silent = "of a rank (with --max-restarts: stopped), after which it is taken for lost (default: 3)"
    add(group, "--silence", type=seconds, default=3.0, metavar="SECONDS", help=silent)
    port = "with --on-loss: Prometheus finds /metrics there, where the coordinator listens (default: 0, nowhere)"
    add(group, "--metrics-port", type=whole_number(0, 65535), default=0, metavar="PORT", help=port)
    slow = "with --on-loss: drain a rank that computes so many times slower than the others (default: 0, never)"
    add(group, "--drain-slower-than", type=seconds, default=0.0, metavar="X", help=slow)
    add(group, "--threads-per-rank", type=at_least_1, metavar="N", help="OMP_NUM_THREADS (default: cores / ranks)")
    wait = "from asking a rank to stop to killing it (default: 10)"
    add(group, "--shutdown-timeout", type=seconds, default=10.0, metavar="SECONDS", help=wait)
    add(group, "--dry-run", action="store_true", help="show each rank's host, device and command; start nothing")


class Parser(argparse.ArgumentParser):
    """Reports mistakes as ConfigError, takes no abbreviations, and knows every option in both spellings."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def add(group: Any, *names: str, **settings: Any) -> None:
    """Add an option; where its name has dashes inside, its underscore spelling works too, unlisted."""
    action = group.add_argument(*names, **settings)
    other = "--" + action.dest
    if other not in names:
        unlisted = {"dest": action.dest, "help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        group.add_argument(other, **{**settings, **unlisted})


class BothSpellings:
    """A parser, or group, whose add_argument adds the underscore spelling as well."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def add_argument(self, *names: str, **settings: Any) -> None:
        if not names[0].startswith("-"):  # an argument by its place
            self._group.add_argument(*names, **settings)
            return
        settings.setdefault("dest", names[0].lstrip("-").replace("-", "_"))
        add(self._group, *names, **settings)


class PassOn(argparse.Action):
    """Keeps an option, in the order given, for the job."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        name = "--" + self.dest.replace("_", "-")
        if self.nargs == 0:
            words = [name]
            setattr(namespace, self.dest, True)
        else:  # argparse of the job would take a value such as -1x for an option
            words = [f"{name}={values}"] if str(values).startswith("-") else [name, str(values)]
        namespace.job_arguments = [*namespace.job_arguments, *words]


def whole_number(least: int, most: int | None = None) -> Any:
    """An argparse type: whole numbers between these, both included."""
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {limits}")
        return int(text)

    return parse


def seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return float(text)


def _endpoint(text: str) -> tuple[str, int]:
    host, _, port = text.partition(":")
    if not host:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host, whole_number(0, 65535)(port or "0")  # 0: a free one, as in torchrun


def _streams(text: str) -> str:
    if not re.fullmatch(r"[0-3]|\d+:[0-3](,\d+:[0-3])*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 to 3, or RANK:0 to 3")
    return text
