"""What this host knows of jobs: where each one's controller is, so that `status` and `stop` work from any node.

A file a job in the user's cache folder, readable by this user only (it holds the job's secret).
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from ..core.environment import user_cache_folder
from ..core.errors import ConfigError

_KEPT = 200  # records; older ones go


def write(job: str, **known: Any) -> Path:
    """Note a job that this host has a part in."""
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{job}.json"
    started = {"job": job, "pid": os.getpid(), "host": socket.gethostname(), "started": time.time(), "code": None}
    _replace(path, {**started, **known})
    for old in sorted(folder.glob("*.json"), key=lambda entry: -_changed(entry))[_KEPT:]:
        old.unlink(missing_ok=True)
    return path


def add(path: Path, **known: Any) -> None:
    """Note more of it."""
    _replace(path, {**json.loads(path.read_text()), **known})


def end(path: Path, code: int) -> None:
    """Note how it ended."""
    try:
        _replace(path, {**json.loads(path.read_text()), "code": code, "ended": time.time()})
    except (OSError, ValueError):  # the record is a help, not a condition
        return


def coordinator(address: str, port: int, secret: str) -> dict[str, Any]:
    """What a record says of the coordinator of a job that survives losses. What ends with "secret" is not shown."""
    return {"coordinator": [address, port], "coordinator_secret": secret}


def read(job: str) -> dict[str, Any]:
    """Raises ConfigError where this host knows nothing of the job."""
    try:
        return json.loads((_folder() / f"{job}.json").read_text())
    except FileNotFoundError:
        known = ", ".join(record["job"] for record in everything()[:5]) or "none"
        raise ConfigError(f"job {job}: this host has no part in it; the latest here: {known}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"job {job}: its record cannot be read ({error})") from None


def everything() -> list[dict[str, Any]]:
    """All jobs this host knows of, the latest first."""
    found = []
    for path in _folder().glob("*.json"):
        try:
            found.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return sorted(found, key=lambda record: -record["started"])


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another launcher has just removed it
        return 0.0


def _folder() -> Path:
    return user_cache_folder() / "moe_runtime" / "jobs"


def _replace(path: Path, record: dict[str, Any]) -> None:
    new = path.with_suffix(f".{os.getpid()}.tmp")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(record, file)
    os.replace(new, path)
