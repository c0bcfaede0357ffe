"""A stand-in for cupy that runs kernels on the host: their own text, compiled as C++ behind native/cuda_on_host.h.

It answers to the calls that comm/cuda.py makes of cupy, on CPU tensors, and checks what a device would not forgive:
parameters of other sizes than the kernel's, loads and stores that are not aligned, writes outside the tensors, and
results that depend on the order in which threads run (every launch runs twice, the second time backwards).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

HEADER = Path(__file__).resolve().parent / "native" / "cuda_on_host.h"
FLAGS = ["-std=c++14", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-w"]
OUTCOMES = ("", "a misaligned load or store", "threads that wait where others have ended")
GUARD = 256  # bytes of 0xff on both sides of every tensor: a nan, or -1


class KernelFault(AssertionError):
    """What a device would punish with a fault, or with results that change from run to run."""


def find_compiler(folder: Path) -> tuple[str | None, str]:
    """(a C++ compiler that builds a kernel here, or None; why not)."""
    compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None:
        return None, "no C++ compiler (g++, c++ or clang++) is on PATH"
    try:
        _build(compiler, 'extern "C" __global__ void nothing(int* x) { x[0] = 1; }', "nothing", folder / "probe.so")
    except (RuntimeError, OSError) as error:
        return None, f"{compiler} does not build kernels for the host: {str(error)[-300:]}"
    return compiler, ""


def _build(compiler: str, code: str, name: str, library: Path) -> ctypes.CDLL:
    text, unit = library.with_suffix(".cpp"), library.with_suffix(".o")
    text.write_text(f'#include "{HEADER}"\n{code}\nCUDA_ON_HOST({name})\n')
    # The sanitizer's calls go to the header, not to its runtime: it is named to the compiler and not to the linker.
    for command in ([*FLAGS, "-fsanitize=alignment", "-c", text, "-o", unit], ["-shared", unit, "-o", library]):
        built = subprocess.run([compiler, *command], capture_output=True, text=True, timeout=120, check=False)
        if built.returncode:
            raise RuntimeError(built.stderr)
    return ctypes.CDLL(str(library))


class HostCupy:
    """The part of cupy that comm/cuda.py uses. `launched`: the kernels that ran, by name."""

    __version__ = "on the host"

    def __init__(self, compiler: str, folder: Path, stream: int) -> None:
        self._compiler, self._folder, self._stream = compiler, folder, stream
        self._libraries: dict[str, ctypes.CDLL] = {}
        self.launched: list[str] = []
        self.cuda = SimpleNamespace(
            Device=lambda index: contextlib.nullcontext(),
            ExternalStream=self._external_stream,
            compiler=SimpleNamespace(CompileException=RuntimeError),
        )

    def _external_stream(self, pointer: int, device: int | None) -> contextlib.AbstractContextManager:
        assert pointer == self._stream, "not torch's current stream"
        return contextlib.nullcontext()

    @staticmethod
    def from_dlpack(tensor: Any) -> np.ndarray:
        shared = np.from_dlpack(tensor)
        assert shared.ctypes.data == tensor.data_ptr(), "DLPack copied"
        return shared

    def RawKernel(self, code: str, name: str) -> Any:
        if code not in self._libraries:
            path = self._folder / f"kernel{len(self._libraries)}.so"
            self._libraries[code] = _build(self._compiler, code, name, path)
        library = self._libraries[code]

        def launch(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
            self.launched.append(name)
            _check_parameters(library, name, arguments)
            before = [_span(argument) for argument in arguments]
            after = [_run(library, name, grid[0], block[0], arguments, before, backwards) for backwards in (0, 1)]
            for argument, forth, back in zip(arguments, *after, strict=True):
                if forth != back:
                    raise KernelFault(f"{name}: the result depends on the order in which threads run")
                if isinstance(argument, np.ndarray):
                    ctypes.memmove(argument.ctypes.data, forth, len(forth))

        return launch


def _check_parameters(library: ctypes.CDLL, name: str, arguments: tuple[Any, ...]) -> None:
    given = [-8 if isinstance(argument, np.ndarray) else argument.itemsize for argument in arguments]
    wanted = list(itertools.takewhile(bool, map(library.parameter_bytes, range(len(given) + 1))))
    if given != wanted:
        raise KernelFault(f"{name} takes parameters of {wanted} bytes, got {given}")


def _span(argument: Any) -> bytes:
    """From the first to the last byte of an array of bytes, gaps between rows included; of a number its own bytes."""
    if not isinstance(argument, np.ndarray):
        return argument.tobytes()
    assert argument.dtype == np.uint8 and argument.size and min(argument.strides) >= 0
    last = sum((extent - 1) * stride for extent, stride in zip(argument.shape, argument.strides, strict=True))
    return ctypes.string_at(argument.ctypes.data, last + 1)


def _run(
    library: ctypes.CDLL, name: str, blocks: int, threads: int, arguments: tuple, before: list[bytes], backwards: int
) -> list[bytes]:
    """One run on copies between guards, as aligned as the tensors are; the copies' bytes afterwards."""
    copies, addresses = [], []
    for argument, data in zip(arguments, before, strict=True):
        buffer = np.full(len(data) + 2 * GUARD + 64, 0xFF, dtype=np.uint8)
        wanted = argument.ctypes.data if isinstance(argument, np.ndarray) else 0
        start = GUARD + (wanted - buffer.ctypes.data - GUARD) % 64
        buffer[start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
        copies.append((buffer, start, start + len(data)))
        place = ctypes.c_uint64(buffer.ctypes.data + start)
        addresses.append(place if isinstance(argument, np.ndarray) else ctypes.create_string_buffer(data, len(data)))
    pointers = (ctypes.c_void_p * len(addresses))(*map(ctypes.addressof, addresses))
    outcome = library.launch(blocks, threads, backwards, pointers)
    if outcome:
        raise KernelFault(f"{name}: {OUTCOMES[outcome]}")
    for number, (buffer, start, end) in enumerate(copies):
        if not (buffer[:start] == 0xFF).all() or not (buffer[end:] == 0xFF).all():
            raise KernelFault(f"{name}: wrote outside parameter {number}")
    return [buffer[start:end].tobytes() for buffer, start, end in copies]
