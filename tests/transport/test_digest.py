"""The segment digest: fixed vectors, an independent model, splits, implementations, sensitivity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.conftest import i32, random_bytes, u64
from transport import Digest, digest, digest_batch, digest_with, implementations

MASK = (1 << 64) - 1
ODD = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


WORDS = [mix((k + 1) * ODD & MASK) for k in range(16 * 8 + 24)]
KEYS, SCRAMBLE, INIT, MERGE = WORDS[:128], WORDS[128:136], WORDS[136:144], WORDS[144:]


def model(data: bytes) -> int:
    """The definition in digest.hpp, written out in Python."""
    total = 0
    for number, start in enumerate(range(0, len(data), 4096)):
        chunk = data[start : start + 4096]
        acc = list(INIT)
        for s in range((len(chunk) + 63) // 64):
            stripe = chunk[64 * s : 64 * s + 64].ljust(64, b"\0")
            words = [int.from_bytes(stripe[8 * k : 8 * k + 8], "little") for k in range(8)]
            for lane, word in enumerate(words):
                x = word ^ KEYS[s % 16 * 8 + lane]
                acc[lane] = (acc[lane] + (x & 0xFFFFFFFF) * (x >> 32)) & MASK
                acc[lane ^ 1] = (acc[lane ^ 1] + word) & MASK
            if s % 16 == 15:
                acc = [(a ^ a >> 47 ^ SCRAMBLE[k]) * 0x9E3779B1 & MASK for k, a in enumerate(acc)]
        m = 0
        for k in range(0, 8, 2):
            product = (acc[k] ^ MERGE[k]) * (acc[k + 1] ^ MERGE[k + 1])
            m += (product & MASK) ^ (product >> 64)
        total += mix((m & MASK) ^ mix((number * ODD + len(chunk)) & MASK))
    return mix((total & MASK) ^ mix((len(data) * ODD + 1) & MASK))


# Pinned: regions written by one version are verified by another.
VECTORS = {
    b"": 0x7AB40E090F363A7D,
    b"\0": 0x22E8F94D3FB6A1B3,
    b"memfabric": 0x3BEC34FF06C1FE12,
    bytes(range(64)): 0xEA4772998E28DD63,
    bytes(range(256)) * 16: 0xE0236640AC5758CA,
    bytes(4096): 0xDE6F5EA67AC31796,
    bytes(range(251)) * 100: 0x4CA0D19B05B5D0CD,
}


@pytest.mark.parametrize("data", VECTORS, ids=len)
def test_fixed_vectors(data: bytes) -> None:
    assert digest(data) == VECTORS[data]


@given(st.binary(max_size=300) | st.integers(0, 20000).map(lambda n: random_bytes(n, n).tobytes()))
@settings(max_examples=60, deadline=None)
def test_equals_the_model(data: bytes) -> None:
    assert digest(data) == model(data)


@pytest.mark.parametrize("size", [1023, 1024, 1025, 4031, 4032, 4033, 4095, 4096, 4097, 8191, 8192, 12345])
def test_equals_the_model_at_edges(size: int) -> None:
    data = random_bytes(size, size).tobytes()
    assert digest(data) == model(data)


def test_scalar_is_always_there_and_last() -> None:
    assert implementations()[-1] == "scalar"


def test_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="sse9"):
        digest_with("sse9", b"")


@pytest.mark.parametrize("name", implementations())
def test_implementations_agree_for_all_sizes_and_alignments(name: str) -> None:
    data = random_bytes(9000)
    for size in [*range(200), *range(960, 1100), *range(4000, 4200), 8191, 8192, 8193]:
        part = data[size % 64 : size % 64 + size]
        assert digest_with(name, part) == digest_with("scalar", part), size


@given(data=st.data(), name=st.sampled_from(implementations()), copying=st.booleans(), streaming=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_split_gives_the_same_bits(data: st.DataObject, name: str, copying: bool, streaming: bool) -> None:
    size = data.draw(st.integers(0, 20000))
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=12)))
    source = random_bytes(size + 64, size)[data.draw(st.integers(0, 63)) :][:size]
    target = np.zeros(size + 64, np.uint8)[data.draw(st.integers(0, 63)) :][:size]
    stream = Digest(name)
    for begin, end in zip([0, *cuts], [*cuts, size], strict=True):
        if copying:
            stream.copy(target[begin:end], source[begin:end], streaming)
        else:
            stream.update(source[begin:end])
    assert stream.finish() == digest(source)
    if copying:
        assert np.array_equal(target, source)


def test_finish_does_not_end_the_stream_and_reset_does() -> None:
    stream = Digest()
    stream.update(b"mem")
    assert stream.finish() == digest(b"mem")
    stream.update(b"fabric")
    assert stream.finish() == stream.finish() == digest(b"memfabric")
    stream.reset()
    assert stream.finish() == digest(b"")


def test_every_flipped_bit_shows() -> None:
    data = random_bytes(4096 + 100)
    seen = {digest(data)}
    for bit in range(8 * data.size):
        data[bit // 8] ^= 1 << bit % 8
        seen.add(digest(data))
        data[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 8 * data.size + 1


@pytest.mark.parametrize("unit", [8, 64, 1024, 4096])
def test_swapped_units_show(unit: int) -> None:
    data = random_bytes(16 * unit if unit > 64 else 4096)
    seen = {digest(data)}
    count = min(data.size // unit, 40)
    for a in range(count):
        for b in range(a):
            moved = data.reshape(-1, unit).copy()
            moved[[a, b]] = moved[[b, a]]
            seen.add(digest(moved.reshape(-1)))
    assert len(seen) == count * (count - 1) // 2 + 1


def test_length_and_zeros_show() -> None:
    sizes = [*range(130), *range(1000, 1100), *range(4000, 4200), 8192, 12288]
    assert len({digest(bytes(size)) for size in sizes}) == len(sizes)
    assert digest(b"a") != digest(b"a\0")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_digest_batch_hashes_groups_as_streams(data: st.DataObject) -> None:
    memory = random_bytes(1 << 16)
    count = data.draw(st.integers(0, 12))
    groups = data.draw(st.integers(1, 5))
    start = [data.draw(st.integers(0, 40000)) for _ in range(count)]
    length = [data.draw(st.integers(0, 20000)) for _ in range(count)]
    group = sorted(data.draw(st.integers(0, groups - 1)) for _ in range(count))
    group = [-1 if data.draw(st.integers(0, 4)) == 0 else g for g in group]
    out = np.zeros(groups, np.uint64)
    digest_batch(
        u64(*(memory.ctypes.data + s for s in start)), u64(*length), i32(*group), out, data.draw(st.integers(0, 3))
    )
    for g in range(groups):
        parts = [memory[s : s + n].tobytes() for s, n, k in zip(start, length, group, strict=True) if k == g]
        assert int(out[g]) == digest(b"".join(parts))


def test_digest_batch_refuses_null_and_wrapping_addresses() -> None:
    for address, length in [(0, 1), (MASK, 2)]:
        with pytest.raises(ValueError, match="operation 0"):
            digest_batch(u64(address), u64(length), i32(0), u64(0))
