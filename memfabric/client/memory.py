"""Where a batch's bytes are in this process.

`Memory` is what native code needs to compute addresses, and the owners that must live until the copy is over.
`PagedLayout` describes an engine's KV tensors once; `PagedBlocks` picks blocks of it. Responsible for
addresses and extents only; `buffers` decides what callers may pass. No address can leave its tensor: native
code holds each against the extent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from memfabric import _native
from memfabric.client import gpu
from memfabric.errors import UsageError

if TYPE_CHECKING:
    from transport.gpu import Device

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
FRAGMENT_FIELDS = 6
"""base, stride, bytes, segment, low, high: see `memfabric._native.plan`."""


@dataclasses.dataclass(frozen=True, slots=True)
class BlockShape:
    """How the blocks of a namespace are cut."""

    block_bytes: int
    segments: int

    @property
    def segment_bytes(self) -> int:
        """Bytes of one segment."""
        return self.block_bytes // self.segments


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """Addresses of `count` blocks, of some of their segments.

    Attributes:
        fragments: int64 ``[F, 6]``, ordered by segment.
        block_base: u64 ``[count]`` added to a block's addresses, or None.
        block_id: int64 ``[count]`` which block of the tensors, or None where strides do not matter.
        first_segment, segment_count: what `fragments` covers.
        owners: objects that keep the addresses valid.
        device: whose memory it is; None: the host's.
        streams: of memory of a device: the caller's streams whose work of now comes first.
    """

    fragments: Int64s
    block_base: UInt64s | None
    block_id: Int64s | None
    count: int
    first_segment: int
    segment_count: int
    owners: tuple[Any, ...]
    device: Device | None = None
    streams: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """As `transport.base.Batch.kind`."""
        return "cpu" if self.device is None else gpu.KIND

    def select(self, positions: npt.NDArray[np.intp] | slice) -> Memory:
        """The same memory for some of the blocks."""
        base = None if self.block_base is None else np.ascontiguousarray(self.block_base[positions])
        ids = None if self.block_id is None else np.ascontiguousarray(self.block_id[positions])
        column = base if base is not None else ids
        assert column is not None, "a memory has addresses or block ids"
        return dataclasses.replace(self, block_base=base, block_id=ids, count=len(column))


_TEMPLATES: dict[tuple[int, int, int, int], Int64s] = {}


def block_fragments(shape: BlockShape, first: int, count: int) -> Int64s:
    """Fragments of blocks that lie contiguously at ``block_base``: one per selected segment, from offset 0
    on."""
    key = (shape.block_bytes, shape.segments, first, count)
    found = _TEMPLATES.get(key)
    if found is None:
        size = shape.segment_bytes
        found = np.zeros((count, FRAGMENT_FIELDS), np.int64)
        found[:, 0] = np.arange(count) * size
        found[:, 2] = size
        found[:, 3] = np.arange(first, first + count)
        found[:, 5] = count * size
        if len(_TEMPLATES) < 256:
            _TEMPLATES[key] = found
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """One object's memory: where, how much, and what may be done with it. `device`: whose; None: the host's."""

    address: int
    size_bytes: int
    writable: bool
    contiguous: bool
    owner: Any
    device: Device | None = None


def extent_of(value: Any, what: str) -> Extent:
    """The memory of a numpy array, torch tensor, GPU array or anything with the buffer protocol.

    Raises:
        UsageError: none of these; memory of a GPU where none can be used; Python objects inside.
    """
    if hasattr(value, "data_ptr") and hasattr(value, "element_size"):
        return _tensor_extent(value, what)
    try:
        address, size, _, writable, contiguous, objects = _native.buffer_info(value)
    except (TypeError, BufferError, ValueError) as error:
        if isinstance(value, np.ndarray):  # a dtype that the buffer protocol cannot express (bfloat16, datetime64)
            return _array_extent(value, what)
        array = gpu.cuda_array(value, what)
        if array is not None:
            return _cuda_extent(array, what)
        raise UsageError(
            f"{what} must be a numpy array, a torch tensor, a GPU array or an object with the buffer protocol, "
            f"got {type(value).__name__}"
        ) from error
    if objects:
        raise UsageError(f"{what} holds Python objects (dtype object), not bytes")
    if not contiguous:
        return _array_extent(np.asarray(value), what)
    # A view keeps a bytearray or array.array from being resized meanwhile; arrays can't be while they are
    # referred to.
    owner = value if isinstance(value, (np.ndarray, bytes)) else memoryview(value)
    return Extent(address, size, writable, contiguous, owner)


def _array_extent(array: npt.NDArray[Any], what: str) -> Extent:
    if array.dtype.hasobject:
        raise UsageError(f"{what} holds Python objects (dtype object), not bytes")
    return Extent(
        array.ctypes.data,
        _span(array.shape, array.strides, array.itemsize, what),
        bool(array.flags.writeable),
        bool(array.flags.c_contiguous),
        array,
    )


def _tensor_extent(tensor: Any, what: str) -> Extent:
    on_gpu = gpu.is_cuda_tensor(tensor)
    where = str(getattr(tensor, "device", "cpu"))
    if not on_gpu and where.split(":")[0] != "cpu":
        raise UsageError(f"{what} is a tensor on {where}; host and CUDA memory can be used: pass tensor.cpu()")
    try:
        item = int(tensor.element_size())
        strides = [int(stride) * item for stride in tensor.stride()]
        size = _span([int(side) for side in tensor.shape], strides, item, what)
        address, contiguous = int(tensor.data_ptr()), bool(tensor.is_contiguous())
        ordinal = int(where.partition(":")[2] or 0) if on_gpu else -1
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UsageError(f"{what} is a tensor without plain memory (sparse or meta): {error}") from error
    device = gpu.device_of(ordinal, address, what) if on_gpu else None
    return Extent(address, size, True, contiguous, tensor, device)


def _cuda_extent(array: gpu.CudaArray, what: str) -> Extent:
    packed = _packed(array.shape, array.item_bytes)
    strides = packed if array.strides is None else array.strides
    # Where there is one item or none along a side, its stride says nothing.
    contiguous = 0 in array.shape or all(
        side == 1 or stride == tight for side, stride, tight in zip(array.shape, strides, packed, strict=True)
    )
    size = _span(array.shape, strides, array.item_bytes, what)
    device = gpu.device_of(array.ordinal, array.address, what)
    return Extent(array.address, size, array.writable, contiguous, array.owner, device)


def _packed(shape: Sequence[int], item_bytes: int) -> tuple[int, ...]:
    """Strides of a C-contiguous array, in bytes."""
    strides = []
    for side in reversed(shape):
        strides.append(item_bytes)
        item_bytes *= side
    return tuple(reversed(strides))


def one_device(extents: Sequence[Extent], what: str) -> Device | None:
    """Whose memory all of them are.

    Raises:
        UsageError: They are of several devices, or some of the host.
    """
    devices = {extent.device for extent in extents}
    if len(devices) > 1:
        names = sorted("the host" if device is None else device.name for device in devices)
        raise UsageError(f"{what} lies in the memory of {' and '.join(names)}; one call takes one of them")
    return next(iter(devices), None)


def _span(shape: Sequence[int], strides: Sequence[int], item_bytes: int, what: str) -> int:
    """Bytes from the first item to behind the last."""
    if any(stride < 0 for stride in strides):
        raise UsageError(f"{what} has a negative stride; pass a copy")
    if 0 in shape:
        return 0
    return sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True)) + item_bytes


class PagedLayout:
    """Where the fragments of every block lie in an engine's KV tensors. Made once, used for every call.

    Fragments are in the order of the block's bytes: by segment, and within a segment as they follow each
    other.

    Attributes:
        fragments: int64 ``[F, 6]``: base address, stride in bytes per block id, bytes, segment, and the
            extent ``[low, high)`` of the fragment's tensor.
        writable: whether blocks can be read *into* all of it.
        block_bytes, segments: what the fragments add up to.
        min_id, max_id: block ids whose fragments all lie inside their tensors.
        device: whose memory the tensors are; None: the host's.
    """

    __slots__ = ("_offsets", "block_bytes", "device", "fragments", "max_id", "min_id", "owners", "segments", "writable")

    def __init__(
        self, fragments: Int64s, *, writable: bool, owners: Sequence[Any], device: Device | None = None
    ) -> None:
        """Take a table as it is; `from_tensors` makes one with true extents.

        Args:
            fragments: as the attribute. The caller answers for the extents: native code touches nothing
                outside.
            writable: whether the memory may be written.
            owners: objects to keep alive for as long as the layout is.
            device: whose memory it is; None: the host's.

        Raises:
            UsageError: wrong shape, segments that do not rise from 0 without gaps, or of unequal sizes.
        """
        table = np.ascontiguousarray(fragments, np.int64)
        if table.ndim != 2 or table.shape[1] != FRAGMENT_FIELDS or not len(table):
            raise UsageError(f"fragments must be int64 [F, {FRAGMENT_FIELDS}] with F >= 1, got {list(table.shape)}")
        segment, size = table[:, 3], table[:, 2]
        if segment[0] != 0 or not np.isin(np.diff(segment), (0, 1)).all():
            raise UsageError("fragments must be ordered by segment, 0 first, none left out")
        if (size < 1).any():
            raise UsageError(
                f"fragment {int(np.argmax(size < 1))} has {int(size.min())} bytes; it must have at least 1"
            )
        totals = np.bincount(segment, weights=size).astype(np.int64)
        if (totals != totals[0]).any():
            odd = int(np.argmax(totals != totals[0]))
            raise UsageError(f"segment 0 has {totals[0]} bytes but segment {odd} has {totals[odd]}; they must be equal")
        self.fragments = table
        self.writable = writable
        self.owners = tuple(owners)
        self.device = device
        self.segments = len(totals)
        self.block_bytes = int(totals.sum())
        self._offsets = np.searchsorted(segment, np.arange(self.segments + 1))
        self.min_id, self.max_id = _id_range(table)
        if self.min_id > self.max_id:
            raise UsageError("no block id puts every fragment inside its tensor; check offsets, strides and sizes")

    @classmethod
    def from_tensors(cls, segments: Sequence[Sequence[tuple[Any, int, int, int]]]) -> PagedLayout:
        """Describe blocks by the tensors they lie in.

        Args:
            segments: per segment its fragments in order, each ``(tensor, base_offset_bytes, stride_bytes,
                fragment_bytes)``: the fragment of block ``b`` is `fragment_bytes` long and starts
                ``base_offset_bytes + b × stride_bytes`` behind the tensor's first element. Tensors: numpy
                arrays, torch tensors, buffers, or arrays of one GPU; they are kept alive, and must not be resized.

        Raises:
            UsageError: see `PagedLayout`, or a tensor whose memory cannot be used.
        """
        rows: list[tuple[int, int, int, int, int, int]] = []
        owners: list[Any] = []
        known: dict[int, Extent] = {}
        writable = True
        for index, fragments in enumerate(segments):
            for part, (tensor, offset, stride, size) in enumerate(fragments):
                extent = known.get(id(tensor))
                if extent is None:
                    extent = extent_of(tensor, f"tensor of fragment {part} of segment {index}")
                    known[id(tensor)] = extent
                    owners += [tensor, extent.owner]
                    writable = writable and extent.writable
                end = extent.address + extent.size_bytes
                rows.append((extent.address + offset, stride, size, index, extent.address, end))
        device = one_device(list(known.values()), "the paged layout")
        table = np.array(rows, np.int64).reshape(-1, FRAGMENT_FIELDS)
        return cls(table, writable=writable, owners=owners, device=device)

    def of_segments(self, first: int, count: int) -> Int64s:
        """The fragments of some segments."""
        return self.fragments[self._offsets[first] : self._offsets[first + count]]

    def __repr__(self) -> str:
        return (
            f"PagedLayout({len(self.fragments)} fragments, {self.segments} segments, {self.block_bytes} bytes a block)"
        )


def _id_range(fragments: Int64s) -> tuple[int, int]:
    """Block ids from 0 on for which base + id × stride … + bytes stays in [low, high) for all fragments;
    exact integers."""
    least, most = 0, 1 << 62
    for base, stride, size, _, low, high in fragments.tolist():
        below, above = low - base, high - size - base  # id × stride must lie in [below, above]
        if stride < 0:
            stride, below, above = -stride, -above, -below
        if stride:
            least, most = max(least, -(-below // stride)), min(most, above // stride)
        elif not below <= 0 <= above:
            return 0, -1
    return least, most


class PagedBlocks:
    """Some blocks of a paged layout, in the order of a call's keys.

    Attributes:
        layout: where fragments lie.
        block_ids: int64 ``[n]``: the engine's block numbers.
    """

    __slots__ = ("block_ids", "layout")

    def __init__(self, layout: PagedLayout, block_ids: Sequence[int] | npt.NDArray[Any]) -> None:
        ids = np.asarray(block_ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise UsageError(f"block_ids must be a list of integers, got {ids.dtype} {list(ids.shape)}")
        self.layout = layout
        self.block_ids = np.ascontiguousarray(ids, np.int64)

    def __len__(self) -> int:
        return len(self.block_ids)

    def __repr__(self) -> str:
        return f"PagedBlocks({len(self)} blocks of {self.layout!r})"
