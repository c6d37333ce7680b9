"""Block keys and fingerprints: equal keys mean equal prefixes in equal layouts, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfabric.core.fingerprint import Fingerprint
from memfabric.core.keys import ROOT, BlockKeys, block_keys

DIGEST = Fingerprint(model="m").digest()
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=100)


def test_keys_are_the_same_in_every_process_and_release() -> None:
    """A fixed vector: a change of these bytes makes every stored block unreachable."""
    assert Fingerprint(model="m", dtype="float16", layers=2).digest().hex() == FINGERPRINT_VECTOR
    assert block_keys(bytes(16), range(8), 4).hex() == KEY_VECTORS
    code = "from memfabric.core.keys import block_keys; print(block_keys(bytes(16), range(8), 4).hex())"
    for seed in ("0", "1"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert out.stdout.strip() == str(KEY_VECTORS)


FINGERPRINT_VECTOR = "ba689207dcc7e5095b27dc929f90e09d"
KEY_VECTORS = ["f45b342b4df96a9b4b26dec929f1bd19", "a35ab5dd273242ded0693ce6ee7a6c56"]


@given(tokens, tokens, st.integers(1, 20))
def test_equal_keys_exactly_for_equal_prefixes(a: list[int], b: list[int], block_tokens: int) -> None:
    left, right = block_keys(DIGEST, a, block_tokens), block_keys(DIGEST, b, block_tokens)
    assert len(left) == len(a) // block_tokens
    for i in range(min(len(left), len(right))):
        end = (i + 1) * block_tokens
        assert (left[i] == right[i]) == (a[:end] == b[:end])


@given(tokens, st.integers(1, 8), st.integers(0, 10))
def test_keys_can_be_continued_from_a_parent(ids: list[int], block_tokens: int, split: int) -> None:
    whole = block_keys(DIGEST, ids, block_tokens)
    split = min(split, len(whole))
    parent = whole[split - 1] if split else ROOT
    tail = block_keys(DIGEST, ids[split * block_tokens :], block_tokens, parent)
    assert tail == whole[split:]


@given(st.sampled_from(Fingerprint.__struct_fields__), tokens.filter(lambda ids: len(ids) >= 4))
def test_every_field_of_the_fingerprint_separates(field: str, ids: list[int]) -> None:
    base = Fingerprint()
    value = "other" if isinstance(getattr(base, field), str) else 7
    other = msgspec.structs.replace(base, **{field: value})
    assert base.digest() != other.digest()
    assert block_keys(base.digest(), ids, 4)[0] != block_keys(other.digest(), ids, 4)[0]
    assert [line.split(":")[0] for line in base.differences(other)] == [field]


def test_fields_cannot_run_into_each_other() -> None:
    assert Fingerprint(model="a;revision='b'").digest() != Fingerprint(model="a", revision="b").digest()
    assert Fingerprint(model="a", revision="").digest() != Fingerprint(model="", revision="a").digest()


def test_kv_bytes_of_a_known_model() -> None:
    """SmolLM2-135M: 30 layers, 3 KV heads of 64, fp32: 46,080 bytes a token."""
    shape = Fingerprint(dtype="float32", layers=30, kv_heads=3, head_dim=64, block_tokens=16)
    assert shape.kv_block_bytes() == 16 * 46_080
    with pytest.raises(ValueError, match="float7"):
        Fingerprint(dtype="float7").kv_block_bytes()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([b"short"], "key 0 must be 16 bytes, got 5 bytes"),
        ([bytes(16), "text"], "key 1 must be 16 bytes, got str"),
        (b"x" * 16, "pass"),
        (np.zeros((2, 8), np.uint8), r"uint8 \[n, 16\]"),
        (np.zeros((2, 16), np.int32), r"uint8 \[n, 16\]"),
        (np.zeros(16, np.uint8), r"uint8 \[n, 16\]"),
    ],
)
def test_bad_keys_are_refused_by_position(keys: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockKeys.parse(keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "block_tokens"),
    [([-1], 1), ([2**32], 1), ([0.5], 1), ([[1]], 1), ([1], 0), (["a"], 1)],
)
def test_bad_tokens_are_refused(ids: object, block_tokens: int) -> None:
    with pytest.raises(ValueError, match=r"token_ids|block_tokens"):
        block_keys(DIGEST, ids, block_tokens)  # type: ignore[arg-type]


def test_slices_keep_parents() -> None:
    keys = block_keys(DIGEST, range(40), 4)
    assert bytes(keys[3:].parents[0]) == keys[2]
    assert bytes(keys.parents[0]) == ROOT
    assert keys[3:5].hex() == keys.hex()[3:5]
    assert len(keys[:0]) == 0
