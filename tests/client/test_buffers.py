"""What callers may pass, and what they are told when it does not fit."""

from __future__ import annotations

import array
import sys
from typing import Any

import numpy as np
import pytest

from memfabric.client.buffers import distinct_keys, key_array, resolve, segment_range, token_column
from memfabric.client.memory import BlockShape, PagedBlocks, PagedLayout
from memfabric.core.keys import BlockKeys
from memfabric.errors import UsageError

SHAPE = BlockShape(64, 4)
READ_ONLY = np.zeros(128, np.uint8)
READ_ONLY.flags.writeable = False


class Tensor:
    """The parts of a torch tensor's surface that the client looks at, over a numpy array."""

    def __init__(self, data: np.ndarray[Any, Any], device: str = "cpu", dense: bool = True) -> None:
        self.data, self.device, self.dense = data, device, dense
        self.shape = data.shape

    def data_ptr(self) -> int:
        return int(self.data.ctypes.data)

    def element_size(self) -> int:
        return self.data.itemsize

    def stride(self) -> tuple[int, ...]:
        if not self.dense:
            raise RuntimeError("sparse tensors do not have strides")
        return tuple(step // self.data.itemsize for step in self.data.strides)

    def is_contiguous(self) -> bool:
        return bool(self.data.flags.c_contiguous)


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((2, 64), np.uint8),
        np.zeros((2, 4, 4), np.float32),
        np.zeros(64, np.float16),
        np.zeros((2, 2, 2, 2, 8), np.int8),
        bytearray(128),
        memoryview(bytearray(128)),
        array.array("d", [0.0] * 16),
        np.zeros(16, "datetime64[s]"),
        Tensor(np.zeros((2, 16), np.float32)),
        [np.zeros(64, np.uint8), bytearray(64)],
        (np.zeros(64, np.uint8), Tensor(np.zeros(16, np.float32))),
    ],
)
def test_any_contiguous_memory_of_the_right_size_will_do(value: Any) -> None:
    for writable in (False, True):
        memory = resolve(value, 2, SHAPE, writable=writable)
        assert memory.count == 2 and memory.block_base is not None
    if not isinstance(value, (list, tuple)):
        assert memory.block_base[1] - memory.block_base[0] == 64


def test_read_only_memory_may_be_read_from() -> None:
    for value in (bytes(128), READ_ONLY, memoryview(bytes(128))):
        resolve(value, 2, SHAPE, writable=False)
        with pytest.raises(UsageError, match="out is read-only"):
            resolve(value, 2, SHAPE, writable=True)
    with pytest.raises(UsageError, match=r"out\[1\] is read-only"):
        resolve([bytearray(64), bytes(64)], 2, SHAPE, writable=True)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (np.zeros((2, 63), np.uint8), r"126 bytes, expected 128 \(2 blocks of 64 bytes\)"),
        (np.zeros(129, np.uint8), "129 bytes, expected 128"),
        (np.zeros((4, 64), np.uint8)[::2], "not C-contiguous"),
        (np.zeros((64, 2), np.uint8).T, "not C-contiguous"),
        (np.zeros(16, object), "Python objects"),
        (np.zeros((2, 64), [("a", object), ("b", "u1", 56)]), "Python objects"),
        (Tensor(np.zeros((2, 64), np.uint8), "xpu:0"), r"tensor on xpu:0.*tensor.cpu"),
        (Tensor(np.zeros((2, 64), np.uint8), dense=False), "sparse"),
        (Tensor(np.zeros((64, 2), np.uint8).T), "not C-contiguous"),
        ([np.zeros(64, np.uint8)], "1 buffers for 2 keys"),
        ([np.zeros(64, np.uint8), np.zeros(32, np.uint8)], r"\[1\] has 32 bytes, expected 64"),
        ("text", "buffer protocol, got str"),
        (None, "buffer protocol, got NoneType"),
        (5, "buffer protocol, got int"),
        ([1, 2], r"\[0\] must be"),
    ],
)
def test_what_does_not_fit_is_refused(value: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        resolve(value, 2, SHAPE, writable=True)


def test_a_buffer_stays_alive_and_in_place() -> None:
    data = bytearray(128)
    memory = resolve(data, 2, SHAPE, writable=True)
    with pytest.raises(BufferError):
        data.extend(b"more")
    del memory
    data.extend(b"more")


def test_paged_blocks_must_match_the_namespace_and_stay_inside() -> None:
    tensor = np.zeros((10, 16), np.uint8)
    layout = PagedLayout.from_tensors([[(tensor, 0, 16, 16)] for _ in range(4)])
    assert resolve(PagedBlocks(layout, [9, 0]), 2, SHAPE, writable=True).count == 2
    for value, why in [
        (PagedBlocks(layout, [1]), "1 block ids for 2 keys"),
        (PagedBlocks(layout, [0, 10]), "block id 10 at position 1 .* 0 to 9"),
        (PagedBlocks(layout, [-1, 0]), "block id -1 at position 0"),
        (PagedBlocks(layout, [2**62, 0]), "lies outside"),
        (PagedBlocks(PagedLayout.from_tensors([[(tensor, 0, 16, 16)]] * 3), [0, 1]), "48 bytes in 3 segments"),
    ]:
        with pytest.raises(UsageError, match=why):
            resolve(value, 2, SHAPE, writable=True)
    for ids in ([[0, 1]], [0.5, 1.0], ["a", "b"]):
        with pytest.raises(UsageError, match="list of integers"):
            PagedBlocks(layout, ids)
    read_only = PagedLayout.from_tensors([[(READ_ONLY, 0, 16, 16)]] * 4)
    resolve(PagedBlocks(read_only, [0, 1]), 2, SHAPE, writable=False)
    with pytest.raises(UsageError, match="read-only"):
        resolve(PagedBlocks(read_only, [0, 1]), 2, SHAPE, writable=True)


def test_strided_tensors_have_the_extent_of_their_items() -> None:
    tensor = np.zeros((10, 2, 16), np.uint8)
    keys = PagedLayout.from_tensors([[(tensor[:, 1], 0, 32, 16)]])
    assert (keys.min_id, keys.max_id) == (0, 9)
    with pytest.raises(UsageError, match="negative stride"):
        PagedLayout.from_tensors([[(Tensor(tensor[::-1]), 0, 32, 16)]])


@pytest.mark.parametrize("key", [b"short", b"x" * 17, b"", "k" * 16, 7, None])
def test_keys_of_the_wrong_kind_are_refused(key: Any) -> None:
    with pytest.raises(UsageError, match="key 1 must be 16 bytes"):
        key_array([b"x" * 16, key])
    with pytest.raises(UsageError):
        key_array([key])
    with pytest.raises(UsageError):
        key_array(key)


@pytest.mark.parametrize(
    "keys", [np.zeros((2, 15), np.uint8), np.zeros((2, 16), np.int8), np.zeros(16, np.uint8), np.zeros((2, 16))]
)
def test_key_arrays_of_the_wrong_shape_or_dtype_are_refused(keys: Any) -> None:
    with pytest.raises(UsageError):
        key_array(keys)


def test_keys_come_in_three_forms() -> None:
    array_ = np.arange(48, dtype=np.uint8).reshape(3, 16)
    raw = [row.tobytes() for row in array_]
    for keys in (array_, raw, tuple(raw), BlockKeys.chain(array_), array_.repeat(2, axis=0)[::2]):
        assert np.array_equal(key_array(keys), array_)
        assert key_array(keys).flags.c_contiguous
    assert key_array([]).shape == (0, 16)
    assert key_array(raw[:1]).shape == (1, 16)


def test_repeated_and_null_keys_are_named() -> None:
    keys = np.arange(80, dtype=np.uint8).reshape(5, 16)
    distinct_keys(keys)
    keys[4] = keys[1]
    with pytest.raises(UsageError, match=f"{keys[1].tobytes().hex()} is in the batch twice, at positions 1 and 4"):
        distinct_keys(keys)
    keys[4] = 0
    with pytest.raises(UsageError, match="key 4 is all zeros"):
        distinct_keys(keys)


def test_token_counts_and_segments() -> None:
    assert token_column(None, 2, 16).tolist() == [16, 16]
    assert token_column([1, 16], 2, 16).tolist() == [1, 16]
    for wrong in ([1], [0, 1], [1, 17], [1.0, 2.0], [[1, 2]], ["a", "b"]):
        with pytest.raises(UsageError, match="token_counts"):
            token_column(wrong, 2, 16)
    assert segment_range(None, SHAPE) == (0, 4)
    assert segment_range(slice(1, 3), SHAPE) == (1, 2)
    assert segment_range(slice(-1, None), SHAPE) == (3, 1)
    for empty in (slice(2, 2), slice(4, 9), slice(0, 4, 2)):
        with pytest.raises(UsageError, match="non-empty slice"):
            segment_range(empty, SHAPE)


def test_gpu_memory_without_cupy_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    tensor = Tensor(np.zeros((2, 64), np.uint8), "cuda:0")
    with pytest.raises(UsageError, match=r"out is in GPU memory.*needs CuPy.*pip install 'memfabric\[cuda\]'"):
        resolve(tensor, 2, SHAPE, writable=True)
    with pytest.raises(UsageError, match="needs CuPy"):
        PagedLayout.from_tensors([[(tensor, 0, 64, 64)]])
