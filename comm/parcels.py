"""Parcels: small messages between the ranks of one host, all of an exchange in one step, with a note on each.

A parcel is written to its place in the receiver's window together with a note of five numbers, and fetched from there:
what a decode step's rows need, instead of agreeing on where they go first. csrc/exchange.h owns the protocol; there is
no slow twin, for without the C extension nothing fits a parcel and everything goes the longer way (comm/lane.py).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from .frames import Bell, Broken, extension
from .window import LINE, Layout

NOTE = 5  # EXCHANGE_NOTE


@dataclass(slots=True, eq=False)
class Post:
    """Parcels that were sent, and what has come of those expected; own parcels travel nowhere.

    numbers [R]: of each rank's parcel each way, 0 of this rank's. lengths [R]: bytes, -1 while it has not come.
    notes [R, 5]. waited_ns [R]: how long this rank has waited for it. message, begin: this rank's own parcel is in
    `message`, from byte `begin` on.
    """

    numbers: np.ndarray
    lengths: np.ndarray
    notes: np.ndarray
    waited_ns: np.ndarray
    message: np.ndarray
    begin: int

    def missing(self) -> list[int]:
        return np.flatnonzero(self.lengths < 0).tolist()


class Parcels:
    """This rank's end of all parcels. Every rank posts to every other; one post at a time is under way, and its arrays
    are the next one's."""

    def __init__(self, rank: int, mine: mmap.mmap, theirs: Mapping[int, mmap.mmap], layout: Layout, use: bool) -> None:
        size = layout.size
        self._rank, self._mine, self._extension = rank, mine, extension()
        self._windows = tuple(theirs.get(peer, mine) for peer in range(size))
        self._at, self._place_bytes = layout.parcels_at, layout.place_bytes
        self._room = layout.place_bytes - LINE if use else -1
        self._scratch = np.empty(0, dtype=np.uint8)
        self._awaited = np.array([-int(peer != rank) for peer in range(size)], dtype=np.int64)
        self._told, self._bounds = np.empty((size, NOTE), dtype=np.int64), np.empty(size + 1, dtype=np.int64)
        self._shares = np.empty(size, dtype=np.int64)
        self._write_told, self._write_bounds, self._write_shares = (
            struct.Struct(f"={array.size}q").pack_into for array in (self._told, self._bounds, self._shares)
        )
        zeros = [np.zeros(size, dtype=np.int64) for _ in range(3)]
        self._post = Post(*zeros[:2], np.zeros((size, NOTE), dtype=np.int64), zeros[2], self._scratch, 0)

    @property
    def used(self) -> bool:
        return self._room > 0

    def fits(self, num_bytes: int) -> bool:
        return num_bytes <= self._room

    def scratch(self, num_bytes: int) -> np.ndarray:
        """Memory for the message of the next post: kept, so that it is touched once."""
        if len(self._scratch) < num_bytes:
            self._scratch = np.empty(num_bytes, dtype=np.uint8)
        return self._scratch[:num_bytes]

    def post(self, message: np.ndarray, bounds: Sequence[int], notes: Sequence[Sequence[int]]) -> Post:
        """Send message[bounds[r]:bounds[r + 1]] with notes[r] to every rank r; raises Broken. Never waits."""
        post, rank = self._post, self._rank
        post.numbers -= self._awaited
        post.lengths[:] = self._awaited
        post.lengths[rank] = bounds[rank + 1] - bounds[rank]
        post.waited_ns.fill(0)
        post.message, post.begin = message, bounds[rank]
        self._write_told(self._told, 0, *chain.from_iterable(notes))  # numpy takes three times as long for so few
        self._write_bounds(self._bounds, 0, *bounds)
        post.notes[rank] = self._told[rank]
        try:
            self._extension.parcels_post(
                self._windows, rank, self._at, self._place_bytes, post.numbers, self._told, message, self._bounds
            )
        except ValueError as error:
            raise Broken(str(error)) from None
        return post

    def gather(self, post: Post, bell: Bell, timeout_s: float) -> bool:
        """Wait for what has not come, so long at most; whether all has. Raises Broken."""
        try:
            took_ns = self._extension.parcels_gather(
                self._mine, self._at, self._place_bytes, post.numbers, post.lengths, post.notes, post.waited_ns,
                bell.spin_ns, int(1e9 * timeout_s),
            )  # fmt: skip
        except ValueError as error:
            raise Broken(str(error)) from None
        bell.learn(took_ns if took_ns >= 0 else int(1e9 * timeout_s))
        return took_ns >= 0

    def fetch(self, post: Post, memory: np.ndarray, shares: Sequence[int]) -> None:
        """Copy every rank's parcel, this one's too, to the end of that rank's share of `memory`: shares[r] bytes."""
        self._write_shares(self._shares, 0, *shares)
        try:
            self._extension.parcels_fetch(
                self._mine, self._at, self._place_bytes, post.numbers, post.lengths, self._shares, memory
            )
        except ValueError as error:
            raise Broken(str(error)) from None
        length = int(post.lengths[self._rank])
        if length:
            end = sum(shares[: self._rank + 1])
            memory[end - length : end] = post.message[post.begin : post.begin + length]
