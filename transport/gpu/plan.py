"""What one launch of the kernel in `move.cu` is told: operations, streams and sums as one array of words.

A *stream* is a run of operations whose bytes are hashed one after another, or that part of a digest group that one
launch covers. The digest of a group is a sum over its chunks of 4 KiB, so a group may be spread over launches wherever
it is cut at a multiple of 4 KiB; `finish` makes digests of the sums.

Pure: columns in, words out. Addresses are numbers here; whose memory they are in is the caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transport.base import Int32Column, UInt64Column

CHUNK_BYTES = 4096
"""Source: transport/native/digest.hpp."""
OPERATION_BYTES = 32
STREAM_BYTES = 32
SUM_BYTES = 8
NO_SUM = (1 << 64) - 1
"""Of a stream that is copied and not hashed."""
_ODD = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class MovePlan:
    """A launch.

    Attributes:
        words: uint64: operations ``[count, 4]`` (position, source, target, stream), streams ``[stream_count, 4]``
            (begin, bytes, first chunk, sum), sums ``[len(groups)]``, zero. The kernel reads and adds in place, so this
            is copied to where it can: to device memory.
        count, stream_count: how many of each.
        chunks: chunks of 4 KiB of the virtual address space, which are the kernel's units of work.
        groups: int32: the digest group of each sum.
    """

    words: UInt64Column
    count: int
    stream_count: int
    chunks: int
    groups: Int32Column

    @property
    def size_bytes(self) -> int:
        """Of `words`."""
        return self.words.nbytes

    @property
    def streams_offset(self) -> int:
        """Bytes from the start of `words` to the streams."""
        return self.count * OPERATION_BYTES

    @property
    def sums_offset(self) -> int:
        """Bytes from the start of `words` to the sums."""
        return self.streams_offset + self.stream_count * STREAM_BYTES


def make_plan(
    source: UInt64Column,
    target: UInt64Column,
    length: UInt64Column,
    group: Int32Column | None = None,
    start: UInt64Column | None = None,
) -> MovePlan:
    """Plan the move of n ranges.

    Args:
        source, target: uint64 [n]; addresses that the device can use. A target of 0: only hash.
        length: uint64 [n]; bytes, at least 1.
        group: int32 [n]; digest group of each, or -1. Non-decreasing apart from -1. None: nothing is hashed.
        start: uint64 [n]; where in its group's bytes each range begins; must be a multiple of 4096 for the first range
            of a group. Only the first one of each group is looked at. None: groups begin here.

    Raises:
        ValueError: a range is empty, or a group begins within a chunk.
    """
    n = len(length)
    if n and not length.all():
        raise ValueError(f"range {int((length == 0).argmax())} is empty; leave empty ranges out")
    if group is None:
        group = np.full(n, -1, np.int32)
    elif (group < 0).any():  # what isn't hashed is one stream, behind the others
        order = np.argsort(group < 0, kind="stable")
        source, target, length, group = source[order], target[order], length[order], group[order]
        start = None if start is None else start[order]
    heads = np.nonzero(np.diff(group, prepend=group[:1] - 1))[0] if n else np.zeros(0, np.intp)
    first = np.zeros(len(heads), np.uint64) if start is None else start[heads]
    hashed = group[heads] >= 0
    if (first[hashed] % np.uint64(CHUNK_BYTES)).any():
        raise ValueError(f"a group can be cut only at multiples of {CHUNK_BYTES} bytes")
    ends = np.cumsum(length, dtype=np.uint64)
    before = ends - length
    bounds = np.append(heads, n)
    total = ends[bounds[1:] - 1] - before[heads] if n else np.zeros(0, np.uint64)
    chunks = (total + np.uint64(CHUNK_BYTES - 1)) // np.uint64(CHUNK_BYTES)
    begin = (np.cumsum(chunks, dtype=np.uint64) - chunks) * np.uint64(CHUNK_BYTES)
    stream = np.repeat(np.arange(len(heads), dtype=np.uint64), np.diff(bounds))
    sum_count = int(hashed.sum())

    words = np.zeros(4 * n + 4 * len(heads) + sum_count, np.uint64)
    operations = words[: 4 * n].reshape(n, 4)
    operations[:, 0] = before - before[heads][stream] + begin[stream] if n else before
    operations[:, 1] = source
    operations[:, 2] = target
    operations[:, 3] = stream
    streams = words[4 * n : 4 * n + 4 * len(heads)].reshape(-1, 4)
    streams[:, 0] = begin
    streams[:, 1] = total
    streams[:, 2] = first // np.uint64(CHUNK_BYTES)
    streams[:, 3] = np.where(hashed, np.arange(len(heads), dtype=np.uint64), np.uint64(NO_SUM))
    return MovePlan(words, n, len(heads), int(chunks.sum()), group[heads][hashed])


def finish(sums: UInt64Column, size_bytes: UInt64Column) -> UInt64Column:
    """Digests of streams, from the sums over all their chunks and their lengths in bytes."""
    return _mix(sums ^ _mix(size_bytes * np.uint64(_ODD) + np.uint64(1)))


def _mix(z: npt.NDArray[np.uint64]) -> UInt64Column:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
