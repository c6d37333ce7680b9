"""Block headers: packed, checked and parsed natively; any damage is found, no bytes crash it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfabric import _native
from memfabric.client.verify import HeaderCheck
from memfabric.core.layout import HEADER_DTYPE, BlockState, header_stride

BLOCK_BYTES = 4096
COUNTS = st.integers(1, 40)
SEGMENTS = st.sampled_from([1, 2, 9, 10, 30])


class Headers:
    """n random headers, as a writer would have packed them."""

    def __init__(self, n: int, segments: int, seed: int = 0, state: BlockState = BlockState.COMPLETE) -> None:
        random = np.random.default_rng(seed)
        self.n, self.segments, self.stride = n, segments, header_stride(segments)
        self.keys = random.integers(0, 256, (n, 16), dtype=np.uint8)
        self.parents = random.integers(0, 256, (n, 16), dtype=np.uint8)
        self.generation = random.integers(0, 2**63, n).astype(np.uint64)
        self.tokens = random.integers(1, 17, n).astype(np.uint32)
        self.digests = random.integers(0, 2**63, n * segments).astype(np.uint64)
        self.raw = np.full(n * self.stride, 0xAA, np.uint8)
        _native.pack_headers(
            self.raw,
            self.stride,
            segments,
            self.keys,
            self.parents,
            self.generation,
            self.tokens,
            BLOCK_BYTES,
            int(state),
            self.digests,
        )

    def check(
        self, digests: npt.NDArray[np.uint64] | None = None, first: int = 0, count: int | None = None
    ) -> list[int]:
        count = self.segments if count is None else count
        status = np.full(self.n, 99, np.uint8)
        good = _native.check_headers(
            self.raw,
            self.stride,
            self.segments,
            BLOCK_BYTES,
            self.keys,
            self.generation,
            first,
            count,
            digests,
            status,
        )
        assert good == (status == 0).sum()
        return status.tolist()


@given(COUNTS, SEGMENTS)
def test_what_is_packed_checks_and_parses(n: int, segments: int) -> None:
    headers = Headers(n, segments)
    assert headers.check(headers.digests) == [HeaderCheck.OK] * n
    assert headers.check(None) == [HeaderCheck.OK] * n
    parsed = _native.parse_headers(headers.raw, headers.stride, n)
    assert parsed["valid"].all()
    assert (parsed["state"] == BlockState.COMPLETE).all()
    assert (parsed["segments"] == segments).all()
    for name in ("keys", "parents", "generation", "tokens"):
        assert np.array_equal(parsed[name], getattr(headers, name))
    assert (parsed["payload_bytes"] == BLOCK_BYTES).all()


def test_the_bytes_are_those_of_the_format() -> None:
    headers = Headers(3, 2)
    rows = headers.raw.reshape(3, headers.stride)
    table = np.ascontiguousarray(rows[:, :64]).view(HEADER_DTYPE)[:, 0]
    assert (table["generation"] == headers.generation).all()
    assert (table["digest0"] == headers.digests[::2]).all()
    assert table["key"][1].tobytes() == headers.keys[1].tobytes()
    assert table["parent"][1].tobytes() == headers.parents[1].tobytes()
    assert (table["state"] == 2).all() and (table["version"] == 1).all() and (table["segments"] == 2).all()
    assert table["crc"][0] == _native.digest(rows[0, 4:72].tobytes()) & 0xFFFFFFFF
    assert not rows[:, 72:].any(), "what the format does not use is zero"


@given(COUNTS, SEGMENTS, st.data())
def test_any_changed_byte_of_a_header_is_found(n: int, segments: int, data: st.DataObject) -> None:
    headers = Headers(n, segments)
    block = data.draw(st.integers(0, n - 1))
    at = data.draw(st.integers(0, 64 + 8 * (segments - 1) - 1))
    headers.raw[block * headers.stride + at] ^= data.draw(st.integers(1, 255))
    expected = [HeaderCheck.OK] * n
    expected[block] = HeaderCheck.TORN
    assert headers.check(headers.digests) == expected
    if at != 6 and at != 7:  # with another segment count the check value covers other bytes: it is found as well
        assert _native.parse_headers(headers.raw, headers.stride, n)["valid"].tolist() == [i != block for i in range(n)]


@given(SEGMENTS, st.data())
def test_each_kind_of_mismatch_has_its_name(segments: int, data: st.DataObject) -> None:
    n = 6
    headers = Headers(n, segments)
    other = Headers(n, segments, seed=1)
    block = data.draw(st.integers(0, n - 1))
    kind = data.draw(st.sampled_from(list(HeaderCheck)[2:7]))
    digests = headers.digests.copy()
    if kind is HeaderCheck.NOT_COMPLETE:
        state = data.draw(st.sampled_from([BlockState.EMPTY, BlockState.WRITING]))
        headers.raw[:] = np.where(
            np.repeat(np.arange(n) == block, headers.stride), Headers(n, segments, state=state).raw, headers.raw
        )
    elif kind is HeaderCheck.OTHER_GENERATION:
        headers.generation[block] += np.uint64(1)
    elif kind is HeaderCheck.OTHER_KEY:
        headers.keys[block] = other.keys[block]
    elif kind is HeaderCheck.WRONG_SIZE:
        _native.pack_headers(
            headers.raw[block * headers.stride : (block + 1) * headers.stride],
            headers.stride,
            segments,
            headers.keys[block : block + 1],
            headers.parents[block : block + 1],
            headers.generation[block : block + 1],
            headers.tokens[block : block + 1],
            BLOCK_BYTES - 1,
            int(BlockState.COMPLETE),
            digests[block * segments : (block + 1) * segments],
        )
    else:
        digests[block * segments + data.draw(st.integers(0, segments - 1))] ^= np.uint64(1)
    expected = [HeaderCheck.OK] * n
    expected[block] = kind
    assert headers.check(digests) == expected


def test_only_the_selected_segments_are_compared() -> None:
    headers = Headers(4, 9)
    picked = np.ascontiguousarray(headers.digests.reshape(4, 9)[:, 3:5]).reshape(-1)
    assert headers.check(picked, 3, 2) == [HeaderCheck.OK] * 4
    assert headers.check(picked, 4, 2) == [HeaderCheck.DIGEST_MISMATCH] * 4


@given(st.binary(max_size=3000), SEGMENTS, st.integers(0, 50))
def test_any_bytes_are_parsed_or_refused(raw: bytes, segments: int, count: int) -> None:
    stride = header_stride(segments)
    if count * stride > len(raw):
        with pytest.raises(ValueError, match="shorter"):
            _native.parse_headers(raw, stride, count)
        return
    parsed = _native.parse_headers(raw, stride, count)
    bad = ~parsed["valid"]
    assert not any(column[bad].any() for name, column in parsed.items() if name != "valid")
    if count:
        n = len(raw) // stride
        status = np.empty(n, np.uint8)
        keys, generation = np.zeros((n, 16), np.uint8), np.zeros(n, np.uint64)
        table = np.frombuffer(raw, np.uint8)
        good = _native.check_headers(table, stride, segments, BLOCK_BYTES, keys, generation, 0, segments, None, status)
        assert good == 0, "random bytes are no header"


def test_a_table_of_zeros_is_empty_and_valid() -> None:
    parsed = _native.parse_headers(bytes(64 * 5), 64, 5)
    assert parsed["valid"].all() and (parsed["state"] == BlockState.EMPTY).all()


@pytest.mark.parametrize(("stride", "count"), [(0, 1), (63, 1), (64, 2**63), (2**60, 1), (65, 1), (64, 3)])
def test_impossible_tables_are_refused(stride: int, count: int) -> None:
    with pytest.raises((ValueError, TypeError)):
        _native.parse_headers(bytes(128), stride, count)


def test_columns_that_do_not_fit_are_refused() -> None:
    headers = Headers(4, 1)
    status = np.empty(4, np.uint8)
    good = (
        headers.raw,
        headers.stride,
        1,
        BLOCK_BYTES,
        headers.keys,
        headers.generation,
        0,
        1,
        headers.digests,
        status,
    )
    assert _native.check_headers(*good) == 4
    for position, wrong in [
        (0, headers.raw[:-1]),
        (1, 8),
        (1, 2**62),
        (2, 0),
        (2, 5000),
        (5, headers.generation[:3]),
        (6, 1),
        (7, 2),
        (8, headers.digests[:3]),
        (9, status[:3]),
    ]:
        with pytest.raises(ValueError):
            _native.check_headers(*good[:position], wrong, *good[position + 1 :])  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _native.check_headers(headers.raw.astype(np.int8), *good[1:])  # type: ignore[arg-type]
