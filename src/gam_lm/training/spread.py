"""Muon's matrices spread over the processes: each orthogonalises a share of them, and the updates are exchanged.

Where weights are whole on every process, so are the updates, and a process sends what it orthogonalised to all others. Where weights are sharded by rows,
the rows of a matrix come to the process that orthogonalises it, and go back.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Matrix(NamedTuple):
    """A logical matrix: rows ``start`` … ``end`` − 1 of a parameter."""

    parameter: int
    """Its number."""
    height: int
    """Rows of the parameter."""
    columns: int
    start: int
    end: int

    @property
    def operations(self) -> int:
        """Of orthogonalising it, up to a factor that all have."""
        short, long = sorted((self.end - self.start, self.columns))
        return short * short * long

    def part(self, process: int, processes: int) -> tuple[int, int]:
        """The rows that a process holds of it where the parameter is sharded: FSDP cuts as torch.chunk does."""
        held = -(-self.height // processes)
        start = max(self.start, process * held)
        return start, max(start, min(self.end, (process + 1) * held))

    def size(self, process: int, processes: int) -> int:
        """Numbers in that part."""
        start, end = self.part(process, processes)
        return (end - start) * self.columns


def matrices_of(shapes: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]) -> list[Matrix]:
    """The logical matrices that parameters are stacked from, in their order: ``rows`` has the row counts of each parameter."""
    return [
        Matrix(number, height, columns, end - count, end)
        for number, ((height, columns), counts) in enumerate(zip(shapes, rows, strict=True))
        for count, end in zip(counts, accumulate(counts), strict=True)
    ]


def shares(matrices: Sequence[Matrix], processes: int) -> list[list[Matrix]]:
    """What each process orthogonalises: the largest matrix first, each goes to the process with the least work so far."""
    work = [(0, process) for process in range(processes)]
    owned: list[list[Matrix]] = [[] for _ in range(processes)]
    for matrix in sorted(matrices, key=lambda each: -each.operations):
        done, process = heapq.heappop(work)
        owned[process].append(matrix)
        heapq.heappush(work, (done + matrix.operations, process))
    return owned


def spread_whole(updates: Sequence[Tensor], owned: Sequence[Sequence[Matrix]], orthogonalize: Callable[[Sequence[Tensor]], None]) -> None:
    """Orthogonalise ``updates`` (rows, columns), the same on all processes, in place."""
    rank = dist.get_rank()
    blocks = [[updates[m.parameter][m.start : m.end] for m in own] for own in owned]
    sizes = [[block.numel() for block in own] for own in blocks]
    orthogonalize(blocks[rank])
    sent = updates[0].new_zeros(max(map(sum, sizes)))
    for block, place in zip(blocks[rank], sent.split([*sizes[rank], len(sent) - sum(sizes[rank])]), strict=False):
        place.copy_(block.flatten())
    received = [torch.empty_like(sent) for _ in owned]
    dist.all_gather(received, sent)
    for process, own in enumerate(blocks):
        if process != rank:
            for block, found in zip(own, received[process][: sum(sizes[process])].split(sizes[process]), strict=True):
                block.copy_(found.view_as(block))


def spread_rows(slices: Sequence[Tensor], owned: Sequence[Sequence[Matrix]], orthogonalize: Callable[[Sequence[Tensor]], None]) -> None:
    """Orthogonalise the matrices whose rows lie in ``slices``, this process's share of every parameter, in place."""
    rank, count = dist.get_rank(), len(owned)

    def own_rows(matrix: Matrix) -> Tensor:
        first = rank * -(-matrix.height // count)
        start, end = matrix.part(rank, count)
        return slices[matrix.parameter][start - first : end - first] if end > start else slices[matrix.parameter][:0]

    to_owner = [sum(m.size(rank, count) for m in own) for own in owned]
    to_rank = [sum(m.size(each, count) for m in owned[rank]) for each in range(count)]
    sent = torch.cat([own_rows(m).flatten() for own in owned for m in own])
    received = sent.new_empty(sum(to_rank))
    dist.all_to_all_single(received, sent, to_rank, to_owner)
    pieces = [found.split([m.size(each, count) for m in owned[rank]]) for each, found in enumerate(received.split(to_rank))]
    blocks = [torch.cat([pieces[each][number].view(-1, m.columns) for each in range(count)]) for number, m in enumerate(owned[rank])]
    orthogonalize(blocks)
    for block, *parts in zip(blocks, *pieces, strict=True):
        for part, found in zip(parts, block.flatten().split([len(part) for part in parts]), strict=True):
            part.copy_(found)
    dist.all_to_all_single(sent, received, to_owner, to_rank)
    flat = [m for own in owned for m in own]
    for m, found in zip(flat, sent.split([m.size(rank, count) for m in flat]), strict=True):
        own_rows(m).copy_(found.view(-1, m.columns))
