"""The form of training checkpoints on disk: what is written, when it counts as whole, what may be removed.

    step-000123/             appears under this name only when all of it is on disk
        manifest.json        step, ranks, placement, the caller's extra; size and crc32 of every file
        rank_0/ rank_1/ ...  each rank's tensors, by torch.distributed.checkpoint as safetensors
    .step-000123.partial/    the same while it is being written, with a note rank_R.json of each rank that is done

Nothing here is a pickle, talks to other ranks, or knows a model. Folders with anything else in them are not touched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from .core.errors import CheckpointError, ConfigError
from .core.files import sync_to_disk, write_atomically
from .core.placement import Placement
from .experts.placement.files import plan_from_dict, plan_to_dict

SCHEMA = 1
KIND = "moe-runtime training state"
MANIFEST = "manifest.json"
FILE_BYTES = 256 << 20  # of tensors per file: a file is put together in memory once more while it is written
_STEP = re.compile(r"step-(\d{6,})")
_UNFINISHED = re.compile(r"\.step-\d{6,}\.(partial|old|removed)")
_OURS = re.compile(r"manifest\.json|rank_\d+|rank_\d+\.json|\.(manifest|rank_\d+)\.json\..*")
# It says so whenever no_dist is asked for, which is how each rank writes its own folder here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself. files: path within it -> [bytes, crc32]."""

    step: int
    num_ranks: int
    optimizer: str
    extra: dict[str, Any]
    placement: Placement
    files: dict[str, list[int]]

    def to_bytes(self) -> bytes:
        body = self._body()
        return json.dumps({"crc32": _crc_of(body), **body}).encode()

    def crc(self) -> int:
        return _crc_of(self._body())

    def _body(self) -> dict[str, Any]:
        body = {
            "kind": KIND, "schema": SCHEMA, "step": self.step, "ranks": self.num_ranks, "optimizer": self.optimizer,
            "extra": self.extra, "placement": plan_to_dict(self.placement), "files": self.files,
        }  # fmt: skip
        return json.loads(json.dumps(body))  # keys that are numbers become what they will be read as

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises CheckpointError: what is wrong with it."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            crc = found.pop("crc32", None)
            if found.get("kind") != KIND:
                raise CheckpointError(f"{path.name} is none of a training checkpoint")
            if found.get("schema") != SCHEMA:
                raise CheckpointError(f"{path.name} has schema {found.get('schema')!r}, this version reads {SCHEMA}")
            if crc != _crc_of(found):
                raise CheckpointError(f"{path.name} is damaged (its checksum differs)")
            placement = plan_from_dict(found["placement"], path.name)
            return cls(found["step"], found["ranks"], found["optimizer"], found["extra"], placement, found["files"])
        except OSError as error:
            raise CheckpointError(f"{path.name} cannot be read ({error.strerror})") from None
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path.name} is damaged ({' '.join(str(error).split())})") from None


def _crc_of(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


# ---- names and what may be removed ----------------------------------------------------------------------------------


def final_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def partial_path(folder: Path, step: int) -> Path:
    return folder / f".step-{step:06d}.partial"


def step_of(name: str) -> int | None:
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def list_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints here, the newest first, undamaged or not."""
    if not folder.is_dir():
        return []
    steps = (step_of(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted((step for step in steps if step is not None), reverse=True)


def steps_to_remove(steps: Iterable[int], damaged: Iterable[int], written: int, keep: int) -> list[int]:
    """Which go now that `written` is complete: all but the newest `keep` up to it, and damaged ones before it."""
    before = sorted(step for step in steps if step <= written)
    broken = set(damaged) - {written}
    good = [step for step in before if step not in broken]
    return [step for step in before if step in broken] + good[:-keep]


def is_ours(path: Path) -> bool:
    """Whether a folder holds nothing but what is written here."""
    return path.is_dir() and not path.is_symlink() and all(_OURS.fullmatch(child.name) for child in path.iterdir())


def tidy(folder: Path, restore_only: bool = False) -> None:
    """After a killed run: an old checkpoint that was being replaced comes back, unfinished ones are removed."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not _UNFINISHED.fullmatch(path.name) or not is_ours(path):
            continue
        final = folder / path.name[1:].rpartition(".")[0]
        if path.suffix == ".old" and not final.exists():
            path.rename(final)
        elif not restore_only:
            shutil.rmtree(path)


# ---- writing --------------------------------------------------------------------------------------------------------


def require_storage() -> tuple[type, type]:
    """torch's writer and reader of safetensors. Raises ConfigError where this torch has none."""
    try:
        from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
    except ImportError:
        raise ConfigError(
            f"training checkpoints need torch.distributed.checkpoint's HuggingFaceStorageWriter, which torch "
            f"{torch.__version__} lacks; take a newer torch, or train without checkpoints"
        ) from None
    return HuggingFaceStorageWriter, HuggingFaceStorageReader


def write_part(partial: Path, rank: int, tensors: dict[str, torch.Tensor]) -> None:
    """This rank's tensors, all in host memory, onto the disk, and then its note. Raises what the disk raises."""
    import torch.distributed.checkpoint as dcp

    part = partial / f"rank_{rank}"
    writer = require_storage()[0](str(part), fqn_to_index_mapping=split_into_files(tensors))
    writer.per_thread_copy_ahead = 0  # it would wait for a device's stream; these tensors are in host memory
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    with _plain_errors():
        dcp.save(tensors, storage_writer=writer, planner=planner, no_dist=True)
    files = {f"{part.name}/{path.name}": _sum_up(path, sync=True) for path in sorted(part.iterdir())}
    sync_to_disk(part)
    _note(partial, rank, {"files": files})


def split_into_files(tensors: Mapping[str, torch.Tensor], most: int = FILE_BYTES) -> dict[str, int]:
    """The number, from 1, of the file that each tensor goes to: a new one whenever the next would pass `most`."""
    number, size = 1, 0
    files = {}
    for key, tensor in tensors.items():
        if size and size + tensor.nbytes > most:
            number, size = number + 1, 0
        files[key] = number
        size += tensor.nbytes
    return files


def write_failure(partial: Path, rank: int, why: str) -> None:
    """Take back this rank's part and say why in its note, for the rank that waits for it."""
    shutil.rmtree(partial / f"rank_{rank}", ignore_errors=True)
    _note(partial, rank, {"failed": why})


def _note(partial: Path, rank: int, said: dict[str, Any]) -> None:
    write_atomically(partial / f"rank_{rank}.json", lambda file: file.write(json.dumps(said).encode()))


def read_notes(partial: Path) -> dict[int, dict[str, Any]]:
    """What ranks have said so far. Listed, not asked for by name: a network file system remembers what it lacked."""
    names = (re.fullmatch(r"rank_(\d+)\.json", path.name) for path in partial.iterdir())
    return {int(name[1]): json.loads((partial / name[0]).read_text()) for name in names if name}


def publish(folder: Path, manifest: Manifest) -> None:
    """All parts are there: write the manifest and give the checkpoint its name."""
    partial, final = partial_path(folder, manifest.step), final_path(folder, manifest.step)
    write_atomically(partial / MANIFEST, lambda file: file.write(manifest.to_bytes()))
    for rank in range(manifest.num_ranks):
        (partial / f"rank_{rank}.json").unlink()
    sync_to_disk(partial)
    old = folder / f".{final.name}.old"
    if final.exists():
        if not is_ours(final):
            raise CheckpointError(f"{final.name} is there and holds other files; it is not overwritten")
        final.rename(old)
    partial.rename(final)
    sync_to_disk(folder)
    if old.exists():
        shutil.rmtree(old)


def discard(partial: Path) -> None:
    """Remove a checkpoint that will not be finished."""
    shutil.rmtree(partial, ignore_errors=True)


def remove_old(folder: Path, damaged: Iterable[int], written: int, keep: int) -> None:
    """Keep the newest `keep` up to the one just written. Folders with other files in them stay."""
    for step in steps_to_remove(list_steps(folder), damaged, written, keep):
        path = final_path(folder, step)
        if is_ours(path):
            removed = folder / f".{path.name}.removed"  # under its name it is whole, or not there
            path.rename(removed)
            shutil.rmtree(removed)


def _sum_up(path: Path, sync: bool = False) -> list[int]:
    """[bytes, crc32] of a file as it can be read."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


# ---- reading --------------------------------------------------------------------------------------------------------


def check_files(path: Path, manifest: Manifest, share: slice) -> None:
    """Compare some of the files, and the names of all, with the manifest. Raises CheckpointError: which differs how."""
    there = {f"{file.parent.name}/{file.name}" for file in path.glob("rank_*/*.safetensors")}
    for name in sorted(there - set(manifest.files)):
        raise CheckpointError(f"{name} is not one of its files")
    largest_first = sorted(manifest.files.items(), key=lambda file: (-file[1][0], file[0]))
    for name, expected in largest_first[share]:
        try:
            found = _sum_up(path / name)
        except FileNotFoundError:
            raise CheckpointError(f"{name} is missing (every host must see the same folder)") from None
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read ({error.strerror})") from None
        if found[0] != expected[0]:
            raise CheckpointError(f"{name} has {found[0]} bytes instead of {expected[0]}")
        if found != expected:
            raise CheckpointError(f"the checksum of {name} differs")


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint: in which rank's folder, of what shape and dtype."""

    rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def list_tensors(path: Path, ranks: Iterable[int]) -> dict[str, Entry]:
    """Every tensor of these ranks' folders by its key; reads headers only. Raises CheckpointError."""
    found = {}
    for rank in ranks:
        with _as_checkpoint_error(path, rank), _plain_errors():
            metadata = require_storage()[1](str(path / f"rank_{rank}")).read_metadata()
        for key, tensor in metadata.state_dict_metadata.items():
            found[key] = Entry(rank, tuple(tensor.size), tensor.properties.dtype)
    return found


def read_tensors(path: Path, targets: Mapping[str, torch.Tensor], entries: Mapping[str, Entry]) -> None:
    """Fill the targets in place from the folders that hold them. Raises CheckpointError."""
    import torch.distributed.checkpoint as dcp

    for rank in sorted({entries[key].rank for key in targets}):
        mine = {key: target for key, target in targets.items() if entries[key].rank == rank}
        reader = require_storage()[1](str(path / f"rank_{rank}"))
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
        with _as_checkpoint_error(path, rank), _plain_errors(), torch.no_grad():
            dcp.load(mine, storage_reader=reader, planner=planner, no_dist=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """torch.distributed.checkpoint wraps what goes wrong, with its traceback as text: raise the error itself."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        cause = next((cause for cause, _ in error.failures.values()), None)
        raise cause if isinstance(cause, Exception) else RuntimeError(str(error)) from None


@contextmanager
def _as_checkpoint_error(path: Path, rank: int) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise CheckpointError(f"{path}/rank_{rank}: cannot be read ({' '.join(str(error).split())})") from error
