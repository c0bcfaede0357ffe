"""A rank's window: the memory that the other ranks of its host write to, and which part of it is whose.

    control | parcels | chunks | arena

Control is csrc/exchange.h's bell and rings. Each other rank has two places for parcels, which are small messages with
the rows in them, and two chunks, through which messages go that have no
place of their own. The arena is lent out in regions: the rows of one exchange, which senders write where the receiver
reads them. Memory is anonymous (memfd): it has no name, and nothing is left behind, however a rank ends. Owns no flag
and no socket.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np

from ..core.errors import ConfigError

CHUNKS = 2  # of each pair of ranks: one is filled while the other is emptied
LINE = 64  # bytes that a region's start is aligned to
FRAME_BYTES = 304  # EXCHANGE_FRAME_BYTES
PLACES = 2  # EXCHANGE_PLACES, for parcels of each rank
_PAGE = 4096
_LARGEST_CHUNK = 1 << 20
_LARGEST_PLACE = 1 << 18
_STEP = 1 << 20  # memory is taken from the kernel in steps of this many bytes
_MADV_POPULATE_WRITE = 23  # Linux 5.14


def control_bytes(size: int) -> int:
    """exchange_bytes of csrc/exchange.c: a bell, and for each rank a ring of 16 slots."""
    return LINE + size * (LINE + 16 * (FRAME_BYTES + 16))


@dataclass(frozen=True)
class Layout:
    """Where the parts of a window of `size` ranks lie, in bytes; equal on all ranks of a world."""

    size: int
    place_bytes: int  # of a parcel with its head; 0 where the window is too small for parcels
    chunk_bytes: int
    window_bytes: int

    @property
    def parcels_at(self) -> int:
        return _round(control_bytes(self.size), _PAGE)

    @property
    def chunks_at(self) -> int:
        return self.parcels_at + self.size * PLACES * self.place_bytes

    @property
    def arena_at(self) -> int:
        return self.chunks_at + self.size * CHUNKS * self.chunk_bytes

    def chunks(self, window: mmap.mmap, source: int) -> np.ndarray:
        """[CHUNKS, chunk_bytes]: where rank `source` writes what has no region."""
        shape, each = (CHUNKS, self.chunk_bytes), CHUNKS * self.chunk_bytes
        return np.frombuffer(window, np.uint8, each, self.chunks_at + source * each).reshape(shape)

    def is_region(self, at: int, num_bytes: int) -> bool:
        """Whether these bytes lie in the arena: asked of every place that another rank names."""
        return self.arena_at <= at <= self.window_bytes - num_bytes


def layout_of(size: int, window_bytes: int) -> Layout:
    """Chunks take at most a quarter of the window and 2 MiB per rank, parcels an eighth and half a MiB; the arena has
    the rest."""
    chunk = min(window_bytes // 4 // (size * CHUNKS), _LARGEST_CHUNK) // _PAGE * _PAGE
    place = min(window_bytes // 8 // (size * PLACES), _LARGEST_PLACE) // _PAGE * _PAGE
    layout = Layout(size, place, max(chunk, _PAGE), window_bytes // _PAGE * _PAGE)
    if layout.arena_at > layout.window_bytes:
        raise ConfigError(
            f"a window of {window_bytes} bytes is too small for {size} ranks: at least {layout.arena_at} bytes"
        )
    return layout


def create(layout: Layout) -> int:
    """A descriptor of anonymous memory whose length nobody can change any more (a shorter one would be a SIGBUS)."""
    window = os.memfd_create("moe-runtime", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(window, layout.window_bytes)
    fcntl.fcntl(window, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return window


class Pages:
    """The pages of a window that this process has: taken once, up to the highest byte ever needed, and kept.

    So steady state has no page faults, and a window costs what was used of it and not its length.
    """

    def __init__(self, window: mmap.mmap, begin: int) -> None:
        self._window, self.end = window, begin

    def need(self, end: int, ours: bool) -> bool:
        """Have all bytes before `end`; False where the machine has no memory for them.

        ours: whether the memory is this rank's own and unused; another rank's is there already and only mapped here.
        """
        if end <= self.end:
            return True
        begin, end = self.end // _PAGE * _PAGE, min(_round(end, _STEP), len(self._window))
        try:
            self._window.madvise(_MADV_POPULATE_WRITE, begin, end - begin)
        except OSError as error:
            if error.errno != errno.EINVAL:
                return False
            if ours:  # an older kernel: touch one byte of each page
                np.frombuffer(self._window, np.uint8, end - self.end, self.end)[::_PAGE] = 0
        self.end = end
        return True


class Arena:
    """Lends regions of a rank's own window. A region comes back when its array and all views of it are gone.

    First fit from the start, so that the same pages are used again. At most 64 bytes per region are lost.
    """

    def __init__(self, window: mmap.mmap, layout: Layout) -> None:
        self._window, self._layout = window, layout
        self._pages = Pages(window, layout.arena_at)
        self._lent: list[tuple[int, int]] = []  # (begin, end), sorted
        self._returned: deque[int] = deque()  # begins; arrays end in any thread, at any moment

    @property
    def touched_bytes(self) -> int:
        return self._pages.end - self._layout.arena_at

    @property
    def lent_bytes(self) -> int:
        self._take_back()
        return sum(end - begin for begin, end in self._lent)

    def lend(self, num_bytes: int) -> tuple[int, np.ndarray] | None:
        """(where, uint8 [num_bytes]), or None where there is no room now. `where` counts from the window's start."""
        self._take_back()
        at, length = self._layout.arena_at, _round(num_bytes, LINE)
        before = 0  # regions that lie before this one
        for begin, end in self._lent:
            if at + length <= begin:
                break
            at, before = end, before + 1
        if at + length > self._layout.window_bytes or not self._pages.need(at + length, ours=True):
            return None
        # Made from the window itself, so that this array is the base of all its views and outlives them.
        region = np.frombuffer(self._window, np.uint8, num_bytes, at)
        weakref.finalize(region, self._returned.append, at).atexit = False
        self._lent.insert(before, (at, at + length))
        return at, region

    def _take_back(self) -> None:
        while self._returned:
            at = self._returned.popleft()
            self._lent = [region for region in self._lent if region[0] != at]


def _round(size: int, step: int) -> int:
    return (size + step - 1) // step * step
