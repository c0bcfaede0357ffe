"""Which files the sources of a training config name, in an order that no file system decides."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import ConfigError

PYTHON_STANDARD_LIBRARY = "python-standard-library"
_NOT_STANDARD = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_KINDS = {".jsonl": "jsonl", ".npy": "tokens", ".bin": "tokens"}


@dataclass(frozen=True)
class SourceFile:
    """One file to read. kind: "text", "jsonl" or "tokens". named: by a source of its own, so it must be readable."""

    path: Path
    kind: str
    named: bool


def find_files(sources: Sequence[str], base: Path) -> list[SourceFile]:
    """The files that `sources` name: source after source, the files of each sorted by the parts of their paths.

    A source is a file, a glob (`**` for any depth), a folder, or "python-standard-library"; relative ones are relative
    to `base`. A folder stands for all files below it but hidden ones; its token arrays (.npy, .bin) are binary files
    like others there and come as text, to be skipped: they count only where named or matched by a glob. A file that two
    sources name counts twice. Raises ConfigError for a source that matches nothing.
    """
    found: list[SourceFile] = []
    for source in sources:
        path = base / source  # an absolute source leaves `base` out
        if source == PYTHON_STANDARD_LIBRARY:
            files = [SourceFile(file, "text", False) for file in _standard_library()]
        elif path.is_dir():
            files = [SourceFile(file, "jsonl" if file.suffix == ".jsonl" else "text", False) for file in _below(path)]
        else:
            named = path.is_file()  # a name with brackets in it is a name first
            matches = [path] if named else [Path(name) for name in glob.glob(str(path), recursive=True)]
            files = [SourceFile(file, _KINDS.get(file.suffix, "text"), named) for file in matches if file.is_file()]
        if not files:
            raise ConfigError(f"data: {source!r} matches no file (looked in {base})")
        found += sorted(files, key=lambda file: file.path.parts)
    return found


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return [path for path in root.rglob("*.py") if not _NOT_STANDARD.intersection(path.relative_to(root).parts)]


def _below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise ConfigError(f"data: {error.filename}: cannot list this folder ({error.strerror})")

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        files = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [file for file in files if file.is_file()]  # no sockets, no dangling links
    return found
