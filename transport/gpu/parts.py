"""A batch cut into parts that fit a staging buffer.

A batch's operations become *pieces*: no piece crosses a *cell*, a run of `cell_bytes` (a multiple of 4 KiB) of its
digest group's bytes. Parts are whole cells, so a group is cut only where its digest can be (see `plan`). In a part,
pieces that follow each other in their region lie side by side, so that the transport sees few and long *runs*, however
scattered the local memory is.

Pure: columns in, columns out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transport.base import Batch, Int32Column, UInt64Column
from transport.gpu.plan import CHUNK_BYTES

ALIGNMENT = 64
"""Of a run in the staging buffer: whole words for the kernel, whole cache lines for the processor."""
RUN_BYTES = 1 << 20
"""About the longest operation that is posted, so that threads, lanes and deadlines keep something to divide."""
MIN_PART_BYTES = 512 << 10
_MOST_CELL_BYTES = 16 << 10

Positions = npt.NDArray[np.intp]


def cell_bytes(part_bytes: int) -> int:
    """Bytes of a cell, such that one fits a part even in pieces of one byte that each are a run.

    Raises:
        ValueError: The part is too small.
    """
    if part_bytes < MIN_PART_BYTES:
        raise ValueError(f"a staging buffer must have at least {MIN_PART_BYTES} bytes, got {part_bytes}")
    most = (part_bytes - ALIGNMENT) // (ALIGNMENT + 1)
    return min(_MOST_CELL_BYTES, most - most % CHUNK_BYTES)


@dataclass(frozen=True)
class Pieces:
    """The pieces of a batch, those without a digest last; empty operations have none.

    Attributes:
        operation: intp [n]; which operation of the batch each belongs to.
        local, region, offset, length, group: As the columns of a batch.
        start: uint64 [n]; where each begins in its group's bytes, or in its operation's where it has no group.
        cells: intp; positions where cells begin, and n.
    """

    operation: Positions
    local: UInt64Column
    region: Int32Column
    offset: UInt64Column
    length: UInt64Column
    group: Int32Column
    start: UInt64Column
    cells: Positions

    def __len__(self) -> int:
        return len(self.local)


def cut(batch: Batch, cell: int) -> Pieces:
    """The pieces of a batch that was checked."""
    group = np.full(len(batch), -1, np.int32) if batch.group is None else batch.group
    operation = np.nonzero(batch.length)[0]
    if (group[operation] < 0).any():
        operation = operation[np.argsort(group[operation] < 0, kind="stable")]
    length, group = batch.length[operation], group[operation]
    before = np.cumsum(length, dtype=np.uint64) - length
    head = np.empty(len(group), np.bool_)
    head[:1] = True
    np.not_equal(group[1:], group[:-1], out=head[1:])
    head |= group < 0
    heads = np.nonzero(head)[0]
    start = before - np.repeat(before[heads], np.diff(np.append(heads, len(group))))

    size = np.uint64(cell)
    first = start // size
    count = ((start + length - np.uint64(1)) // size - first + np.uint64(1)).astype(np.intp) if len(length) else heads
    of = np.repeat(np.arange(len(length)), count)
    number = first[of] + (np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)).astype(np.uint64)
    begin = np.maximum(start[of], number * size)
    end = np.minimum((start + length)[of], (number + np.uint64(1)) * size)
    skip = begin - start[of]
    new = np.empty(len(of), np.bool_)
    new[:1] = True
    new[1:] = (group[of][1:] != group[of][:-1]) | (number[1:] != number[:-1]) | (group[of][1:] < 0)
    return Pieces(
        operation[of],
        batch.local[operation][of] + skip,
        batch.region[operation][of],
        batch.offset[operation][of] + skip,
        end - begin,
        group[of],
        begin,
        np.append(np.nonzero(new)[0], len(of)),
    )


def pack(pieces: Pieces, part_bytes: int, most_pieces: int) -> list[slice]:
    """Parts: as many whole cells as fit the staging buffer and `most_pieces`."""
    if not len(pieces):
        return []
    # The first piece of a part begins a run in any case, for which a little is set aside.
    ends = np.cumsum(pieces.length.astype(np.int64) + ALIGNMENT * _breaks(pieces.region, pieces.offset, pieces.length))
    budget = part_bytes - ALIGNMENT
    at_cells = np.concatenate([[0], ends[pieces.cells[1:] - 1]])
    parts, cell = [], 0
    while cell < len(pieces.cells) - 1:
        by_bytes = int(np.searchsorted(at_cells, at_cells[cell] + budget, side="right")) - 1
        by_count = int(np.searchsorted(pieces.cells, pieces.cells[cell] + most_pieces, side="right")) - 1
        after = max(cell + 1, min(by_bytes, by_count))
        parts.append(slice(int(pieces.cells[cell]), int(pieces.cells[after])))
        cell = after
    return parts


@dataclass(frozen=True)
class Layout:
    """Where a part's pieces lie in the staging buffer, and the runs that they make.

    Attributes:
        position: uint64 [pieces]; bytes from the buffer's start.
        run: intp [pieces]; the run of each.
        run_position, run_region, run_offset, run_length: Of each run; columns for a batch.
        size_bytes: From the buffer's start to behind the last piece.
    """

    position: UInt64Column
    run: Positions
    run_position: UInt64Column
    run_region: Int32Column
    run_offset: UInt64Column
    run_length: UInt64Column
    size_bytes: int


def lay_out(region: Int32Column, offset: UInt64Column, length: UInt64Column) -> Layout:
    """Lay at least one piece out: those that follow each other in their region lie side by side, others are aligned."""
    breaks = _breaks(region, offset, length)
    heads = np.nonzero(breaks)[0]
    counts = np.diff(np.append(heads, len(length)))
    before = np.cumsum(length, dtype=np.uint64) - length
    size = np.add.reduceat(length, heads)
    room = (size + np.uint64(ALIGNMENT - 1)) // np.uint64(ALIGNMENT) * np.uint64(ALIGNMENT)
    inside = before - np.repeat(before[heads], counts)
    position = np.repeat(np.cumsum(room, dtype=np.uint64) - room, counts) + inside
    # Long ones are cut for the transport, not in the buffer.
    cuts = breaks.copy()
    cuts[1:] |= inside[1:] // np.uint64(RUN_BYTES) != inside[:-1] // np.uint64(RUN_BYTES)
    at = np.nonzero(cuts)[0]
    return Layout(
        position,
        np.cumsum(cuts) - 1,
        position[at],
        region[at],
        offset[at],
        np.add.reduceat(length, at),
        int(position[-1] + length[-1]),
    )


def _breaks(region: Int32Column, offset: UInt64Column, length: UInt64Column) -> npt.NDArray[np.bool_]:
    """Where a piece does not go on where the one before it ends."""
    breaks = np.empty(len(length), np.bool_)
    breaks[:1] = True
    breaks[1:] = (region[1:] != region[:-1]) | (offset[1:] != offset[:-1] + length[:-1])
    return breaks
