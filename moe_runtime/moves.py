"""What must travel from one placement to another, in which pieces: pure functions, the same answer on every rank."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .core.placement import Placement


@dataclass(frozen=True)
class Move:
    """One expert's rows from a rank that holds it to one that will."""

    layer: int
    expert: int
    source: int
    destination: int
    num_bytes: int

    def __str__(self) -> str:
        return f"layer {self.layer}, expert {self.expert}, rank {self.source} -> rank {self.destination}"


class Chunk(NamedTuple):
    """Bytes [begin, end) of one move, by its number."""

    move: int
    begin: int
    end: int


def list_moves(old: Placement, new: Placement, expert_bytes: Sequence[int]) -> list[Move]:
    """Every expert that a rank will hold and does not hold yet, by layer, destination and expert.

    expert_bytes [L]: of one expert of each layer. It comes from the holder that has the least to send so far.
    """
    to_send: Counter[int] = Counter()
    moves = []
    for layer, num_bytes in enumerate(expert_bytes):
        holders: dict[int, list[int]] = {}
        for slot, expert in enumerate(old.slot_expert[layer].tolist()):
            holders.setdefault(expert, []).append(int(old.slot_rank[slot]))
        for rank in range(new.num_ranks):
            held = set(old.rank_experts(layer, rank))
            for expert in new.rank_experts(layer, rank):
                if expert not in held:
                    source = min(holders[expert], key=lambda holder: (to_send[holder], holder))
                    to_send[source] += num_bytes
                    moves.append(Move(layer, expert, source, rank, num_bytes))
    return moves


def cut_slices(moves: Sequence[Move], limit: int) -> list[list[Chunk]]:
    """Slices in which no rank sends or receives more than `limit` bytes; each sorted by source, destination, move.

    An expert's bytes may be cut, and come in order. In every slice each source fills what it may send, its destinations
    taking turns, so that sources do not queue for the same one.
    """
    waiting: dict[int, dict[int, deque[int]]] = {}  # moves by source and destination
    for number, move in enumerate(moves):
        waiting.setdefault(move.source, {}).setdefault(move.destination, deque()).append(number)
    turns = {source: deque(queues) for source, queues in waiting.items()}  # of destinations
    for source, destinations in turns.items():
        destinations.rotate(-source)
    done = [0] * len(moves)
    slices: list[list[Chunk]] = []
    while waiting:
        chunks: list[Chunk] = []
        room_in: dict[int, int] = {}
        sources = list(waiting)
        first = len(slices) % len(sources)
        for source in sources[first:] + sources[:first]:
            room_out, queues = limit, waiting[source]
            for _ in range(len(queues)):
                destination = turns[source][0]
                queue, room = queues[destination], room_in.get(destination, limit)
                while queue and room_out and room:
                    number = queue[0]
                    size = min(moves[number].num_bytes - done[number], room_out, room)
                    chunks.append(Chunk(number, done[number], done[number] + size))
                    done[number] += size
                    room_out, room = room_out - size, room - size
                    if done[number] == moves[number].num_bytes:
                        queue.popleft()
                room_in[destination] = room
                if queue:
                    turns[source].rotate(-1)
                else:
                    turns[source].popleft()
                    del queues[destination]
                if not room_out:
                    break
            if not queues:
                del waiting[source]
        chunks.sort(key=lambda chunk: (moves[chunk.move].source, moves[chunk.move].destination, chunk.move))
        slices.append(chunks)
    return slices


def kept_slots(old: Placement, new: Placement, layer: int, rank: int) -> np.ndarray:
    """For each of a rank's new local slots the old one with the same expert, or -1 where it arrives."""
    before = {expert: slot for slot, expert in enumerate(old.rank_experts(layer, rank))}
    return np.array([before.get(expert, -1) for expert in new.rank_experts(layer, rank)], dtype=np.int64)


def order_in_place(kept: np.ndarray) -> list[tuple[int, int]]:
    """Copies (from, to) that bring kept rows to their new slots inside one array without losing any.

    Both placements are in expert order, so rows keep their order: those that go up are copied from the top, those that
    go down from the bottom, and none is overwritten before it has gone.
    """
    pairs = [(int(source), target) for target, source in enumerate(kept) if source >= 0 and source != target]
    down = [pair for pair in pairs if pair[1] < pair[0]]
    up = [pair for pair in reversed(pairs) if pair[1] > pair[0]]
    return down + up
