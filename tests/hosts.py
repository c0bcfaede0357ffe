"""Hosts made of network namespaces, joined by real TCP, with a real sshd in each; and a real Slurm on this machine.

Needs root and Debian's iproute2, openssh-server, slurm-wlm and munge, which `.ci/run` installs; where something is
missing the tests skip and say what.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_runtime.launch.machine import free_port

MOE_LAUNCH = [sys.executable, "-m", "moe_runtime.launch.cli"]
_SBIN = ":/usr/sbin:/sbin"
_NUMBERS = itertools.count()


def which(*programs: str) -> str | None:
    """What is missing of these programs, in words, or None."""
    missing = [name for name in programs if not shutil.which(name, path=os.environ["PATH"] + _SBIN)]
    return f"{', '.join(missing)} not installed (see .ci/run)" if missing else None


class Hosts:
    """`count` namespaces with one address each on a bridge; links may be shaped. Use as a context manager.

    own: a folder that is another one on every host, empty at first; all else of the file system is shared.
    """

    def __init__(self, folder: Path, count: int, mbit: int | None = None, own: Path | None = None) -> None:
        problem = "no root, which network namespaces need" if os.geteuid() else which("ip", "tc", "sshd", "ssh")
        if problem:
            pytest.skip(f"hosts cannot be made here: {problem}")
        self.folder, self.count, self._mbit, self._own = folder, count, mbit, own
        number = (os.getpid() * 7 + next(_NUMBERS)) % 62500
        self._name = f"mr{number}"
        self._net = f"10.{number // 250}.{number % 250}"
        self.addresses = [f"{self._net}.{n + 1}" for n in range(count)]
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        try:
            self._ip(f"link add {self._name} type bridge")
        except subprocess.CalledProcessError as error:
            if "not permitted" not in error.stderr:
                raise
            pytest.skip("hosts cannot be made here: no right to make network interfaces")
        try:
            self._ip(f"addr add {self._net}.254/24 dev {self._name}")
            self._ip(f"link set {self._name} up")
            for n, address in enumerate(self.addresses):
                inside, cable = f"{self._name}n{n}", f"{self._name}v{n}"
                self._ip(f"netns add {inside}")
                self._ip(f"link add {cable} type veth peer name eth0 netns {inside}")
                self._ip(f"link set {cable} master {self._name} up")
                for words in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                    self._ip(f"-n {inside} {words}")
                if self._mbit:
                    shape = f"tc qdisc add dev eth0 root tbf rate {self._mbit}mbit burst 64kb latency 50ms"
                    self.check(n, *shape.split())
            self._start_sshd()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        for n in range(self.count):
            subprocess.run(["ip", "netns", "del", f"{self._name}n{n}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._name], capture_output=True, check=False)

    @property
    def ssh_args(self) -> str:
        """Options with which ssh reaches every host."""
        return f"--engine-args={self._ssh_words}"

    @property
    def _ssh_words(self) -> str:
        files = f"-i {self.folder}/key -o UserKnownHostsFile=/dev/null -F none"
        return f"{files} -o StrictHostKeyChecking=no -o LogLevel=ERROR -o ConnectTimeout=2"

    def ssh(self, host: int, command: str, stdin: bytes = b"") -> str:
        """What a shell command prints on a host, over ssh; it must succeed."""
        words = ["ssh", *self._ssh_words.split(), self.addresses[host], command]
        return subprocess.run(words, input=stdin, capture_output=True, check=True, timeout=30).stdout.decode()

    def on(self, host: int, *command: str | Path) -> list[str]:
        """The command as run on a host."""
        return ["ip", "netns", "exec", f"{self._name}n{host}", *map(str, command)]

    def check(self, host: int, *command: str) -> None:
        """Run a command on a host; it must succeed."""
        subprocess.run(self.on(host, *command), capture_output=True, text=True, check=True)

    @contextmanager
    def unplugged(self, host: int) -> Iterator[None]:
        """While this lasts the host's cable is out: nothing arrives, and nobody is told."""
        self._ip(f"link set {self._name}v{host} down")
        try:
            yield
        finally:
            self._ip(f"link set {self._name}v{host} up")

    def _ip(self, words: str) -> None:
        subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=True)

    def _start_sshd(self) -> None:
        os.makedirs("/run/sshd", exist_ok=True)  # sshd's own, for users without rights
        for name in ("key", "host_key"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(make, check=True, stdin=subprocess.DEVNULL)
        sshd = shutil.which("sshd", path=os.environ["PATH"] + _SBIN) or "sshd"
        for n, address in enumerate(self.addresses):
            options = {
                "AuthorizedKeysFile": f"{self.folder}/key.pub", "StrictModes": "no", "PermitRootLogin": "yes",
                "UsePAM": "no", "PidFile": "none", "ListenAddress": address,
            }  # fmt: skip
            words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
            alone = f'mount -t tmpfs none "{self._own}" && exec "$@"'
            inside = ["unshare", "-m", "sh", "-c", alone, "sh"] if self._own else []
            command = self.on(n, *inside, sshd, "-D", "-e", "-f", "/dev/null", "-h", self.folder / "host_key", *words)
            with (self.folder / f"sshd{n}.log").open("wb") as log:
                self._daemons.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        ends = time.monotonic() + 10
        for n, address in enumerate(self.addresses):
            while True:
                try:
                    socket.create_connection((address, 22), timeout=1).close()
                    break
                except OSError:
                    assert time.monotonic() < ends, (self.folder / f"sshd{n}.log").read_text()
                    time.sleep(0.05)


class Slurm:
    """slurmctld and two slurmd on this machine, with a munged of their own. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        programs = which("munged", "slurmctld", "slurmd", "srun", "scancel", "sbatch")
        problem = "no root, which slurmd needs" if os.geteuid() else programs
        if problem:
            pytest.skip(f"no Slurm can be started here: {problem}")
        self.folder = folder
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Slurm:
        folder, here = self.folder, socket.gethostname()
        (folder / "state").mkdir()
        ports = [free_port() for _ in range(3)]
        nodes = "".join(
            f"NodeName=n{n} NodeHostname={here} NodeAddr=127.0.0.1 Port={ports[n]} CPUs=1\n" for n in (1, 2)
        )
        for n in (1, 2):
            (folder / f"spool_n{n}").mkdir()
        (folder / "slurm.conf").write_text(f"""ClusterName=test
SlurmctldHost={here}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmdSpoolDir={folder}/spool_%n
StateSaveLocation={folder}/state
SlurmUser=root
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=15
{nodes}PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.env["PATH"] += _SBIN
        try:
            munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("pid-file", "log-file", "seed-file")]
            self._start("munged", "-F", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.sock",
                        "--force", *munge)  # fmt: skip
            self._start("slurmctld", "-D")
            for n in (1, 2):
                self._start("slurmd", "-D", "-N", f"n{n}")
            ends = time.monotonic() + 30
            while "2 idle" not in self.run("sinfo", "-h", "-o", "%D %T").stdout:
                assert time.monotonic() < ends, (folder / "slurmctld.log").read_text()
                time.sleep(0.2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str | Path, cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess:
        """Run a command with this Slurm's configuration."""
        words = list(map(str, command))
        return subprocess.run(words, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=timeout)

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as out:
            started = subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self._daemons.append(started)
