"""Argument checks: keys, blocks and outputs, as callers may pass them.

Everything is checked before anything happens; what does not fit raises `UsageError` with what was expected
and what came. Responsible for accepting and refusing; `memory` knows addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from memfabric import _native
from memfabric.client import gpu
from memfabric.client.memory import BlockShape, Extent, Memory, PagedBlocks, block_fragments, extent_of, one_device
from memfabric.core.keys import KEY_BYTES, BlockKeys, KeyArray
from memfabric.errors import UsageError

Keys = BlockKeys | Sequence[bytes] | KeyArray
"""What calls take as keys. Raw keys are a chain in order whose first parent is the root."""


def key_array(keys: Keys) -> KeyArray:
    """Keys as uint8 ``[n, 16]``, C-contiguous.

    Raises:
        UsageError: a key is not 16 bytes, or the array has another shape or dtype.
    """
    if isinstance(keys, BlockKeys):
        return keys.keys
    if isinstance(keys, (list, tuple)) and len(keys) == 1 and type(keys[0]) is bytes and len(keys[0]) == KEY_BYTES:
        return np.frombuffer(keys[0], np.uint8).reshape(1, KEY_BYTES)
    return chained_keys(keys).keys


def chained_keys(keys: Keys) -> BlockKeys:
    """Keys with their parents.

    Raises:
        UsageError: as `key_array`.
    """
    try:
        return BlockKeys.parse(keys)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def distinct_keys(keys: KeyArray) -> None:
    """Refuse a batch that has a key twice, or the null key.

    Raises:
        UsageError: names the key and the two positions.
    """
    first = _native.first_positions(keys)
    again = first != np.arange(len(keys), dtype=np.int32)
    if again.any():
        position = int(np.argmax(again))
        raise UsageError(
            f"key {keys[position].tobytes().hex()} is in the batch twice, at positions {first[position]} and {position}"
        )
    null = ~keys.any(axis=1)
    if null.any():
        raise UsageError(f"key {int(np.argmax(null))} is all zeros, which is reserved for the root of a chain")


def token_column(
    token_counts: Sequence[int] | npt.NDArray[Any] | None, count: int, block_tokens: int
) -> npt.NDArray[np.uint32]:
    """Tokens per block; None means whole blocks.

    Raises:
        UsageError: another length, not integers, or out of ``[1, block_tokens]``.
    """
    if token_counts is None:
        return np.full(count, block_tokens, np.uint32)
    column = np.asarray(token_counts)
    if column.shape != (count,) or (count and column.dtype.kind not in "iu"):
        raise UsageError(f"token_counts must be {count} integers, got {column.dtype} {list(column.shape)}")
    if count and not 1 <= int(column.min()) <= int(column.max()) <= block_tokens:
        raise UsageError(f"token_counts must be 1 to {block_tokens}, got {int(column.min())} to {int(column.max())}")
    return column.astype(np.uint32)


def segment_range(segments: slice | None, shape: BlockShape) -> tuple[int, int]:
    """First segment and count of a slice over a block's segments; None is all of them.

    Raises:
        UsageError: a step, or nothing selected.
    """
    if segments is None:
        return 0, shape.segments
    start, stop, step = segments.indices(shape.segments)
    if step != 1 or stop <= start:
        raise UsageError(f"segments must be a non-empty slice with step 1 of {shape.segments} segments, got {segments}")
    return start, stop - start


def new_output(count: int, shape: BlockShape, segment_count: int) -> npt.NDArray[np.uint8]:
    """A fresh output: uint8 ``[count, bytes of the selected segments]``."""
    return np.empty((count, segment_count * shape.segment_bytes), np.uint8)


def resolve(
    value: Any, count: int, shape: BlockShape, *, writable: bool, first: int = 0, segment_count: int | None = None
) -> Memory:
    """Where `count` blocks (or the selected segments of each) lie in what the caller passed.

    Args:
        value: one C-contiguous array, tensor or buffer of count × bytes; a list or tuple of `count` such, one
            per block; or `PagedBlocks`. Any dtype: it is bytes that count. All of the host, or of one GPU.
        writable: it is an output.

    Raises:
        UsageError: wrong size, read-only, not contiguous, Python objects, memory of a GPU that can't be used.
    """
    what = "out" if writable else "blocks"
    segment_count = shape.segments if segment_count is None else segment_count
    if isinstance(value, PagedBlocks):
        return _resolve_paged(value, count, shape, writable, first, segment_count, what)
    block_bytes = segment_count * shape.segment_bytes
    fragments = block_fragments(shape, first, segment_count)
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise UsageError(f"{what} has {len(value)} buffers for {count} keys")
        extents = [extent_of(item, f"{what}[{i}]") for i, item in enumerate(value)]
        for i, extent in enumerate(extents):
            _check(extent, block_bytes, f"{what}[{i}]", writable, "one block")
        base = np.array([extent.address for extent in extents], np.uint64)
        owners, device = tuple(e.owner for e in extents), one_device(extents, what)
        return Memory(fragments, base, None, count, first, segment_count, owners, device, _streams(device, owners))
    extent = extent_of(value, what)
    _check(extent, count * block_bytes, what, writable, f"{count} blocks of {block_bytes}")
    if count == 1:
        base = np.array([extent.address], np.uint64)
    else:
        base = np.arange(count, dtype=np.uint64)
        base *= np.uint64(block_bytes)
        base += np.uint64(extent.address)
    owners = (extent.owner,)
    streams = _streams(extent.device, owners)
    return Memory(fragments, base, None, count, first, segment_count, owners, extent.device, streams)


def _streams(device: Any, owners: Sequence[Any]) -> tuple[int, ...]:
    return () if device is None else gpu.current_streams(owners)


def _check(extent: Extent, size_bytes: int, what: str, writable: bool, content: str) -> None:
    if not extent.contiguous:
        raise UsageError(f"{what} is not C-contiguous; pass a contiguous array (or describe it with PagedLayout)")
    if extent.size_bytes != size_bytes:
        raise UsageError(f"{what} has {extent.size_bytes} bytes, expected {size_bytes} ({content} bytes)")
    if writable and not extent.writable:
        raise UsageError(f"{what} is read-only")


def _resolve_paged(
    value: PagedBlocks, count: int, shape: BlockShape, writable: bool, first: int, segment_count: int, what: str
) -> Memory:
    layout = value.layout
    if len(value) != count:
        raise UsageError(f"{what} names {len(value)} block ids for {count} keys")
    if (layout.block_bytes, layout.segments) != (shape.block_bytes, shape.segments):
        raise UsageError(
            f"{what}: the paged layout has blocks of {layout.block_bytes} bytes in {layout.segments} segments, the "
            f"namespace has {shape.block_bytes} bytes in {shape.segments}"
        )
    if writable and not layout.writable:
        raise UsageError(f"{what}: a tensor of the paged layout is read-only")
    fragments = layout.of_segments(first, segment_count)
    ids = value.block_ids
    if len(ids) and not layout.min_id <= int(ids.min()) <= int(ids.max()) <= layout.max_id:
        wrong = int(np.argmax((ids < layout.min_id) | (ids > layout.max_id)))
        raise UsageError(
            f"{what}: block id {ids[wrong]} at position {wrong} lies outside the tensors, which hold blocks "
            f"{layout.min_id} to {layout.max_id}"
        )
    streams = _streams(layout.device, layout.owners)
    return Memory(fragments, None, ids, count, first, segment_count, (layout,), layout.device, streams)
