"""Payloads that say what they are, so that any reader can check them without talking to the writer.

A block's bytes are a function of its key id and of a nonce that names the writer and the attempt. Every 8-byte word
depends on both, so bytes of two writers, two keys or two attempts in one block are noticed wherever they are.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from memfabric.core.keys import BlockKeys

MAGIC = 0x6D65_6D66_6162_0001
WORD_BYTES = 8
_HEAD_WORDS = 4


def key_bytes(key_id: int) -> bytes:
    """The 16-byte key of an id; ids are ``chain << 16 | position``."""
    return hashlib.blake2b(key_id.to_bytes(8, "little"), digest_size=16, person=b"mf-test-processe").digest()


def chain(number: int, count: int, start: int = 0) -> tuple[list[int], BlockKeys]:
    """Ids and keys of a chain's blocks ``start … start + count``."""
    ids = [number << 16 | position for position in range(start, start + count)]
    raw = np.frombuffer(b"".join(key_bytes(i) for i in ids), np.uint8).reshape(-1, 16)
    if start:
        return ids, BlockKeys.chain(raw, key_bytes(number << 16 | start - 1))
    return ids, BlockKeys.chain(raw)


def nonce_of(writer: int, attempt: int) -> int:
    """A nonce that no other attempt has."""
    return writer << 40 | attempt


def fill(key_id: int, nonce: int, block_bytes: int) -> npt.NDArray[np.uint8]:
    """The block's bytes."""
    words = np.arange(block_bytes // WORD_BYTES, dtype=np.uint64)
    seed = int.from_bytes(hashlib.blake2b(b"%d/%d" % (key_id, nonce), digest_size=8).digest(), "little")
    words *= np.uint64(0x9E37_79B9_7F4A_7C15)
    words += np.uint64(seed)
    words ^= words >> np.uint64(29)
    words[:_HEAD_WORDS] = (MAGIC, key_id, nonce, seed)
    return words.view(np.uint8)


def fill_many(ids: list[int], nonce: int, block_bytes: int) -> npt.NDArray[np.uint8]:
    """The bytes of several blocks of one attempt, ``[n, block_bytes]``."""
    return np.stack([fill(i, nonce, block_bytes) for i in ids])


def check(key_id: int, block: npt.NDArray[np.uint8]) -> tuple[int, str]:
    """(nonce, "") of a block that is exactly what some attempt wrote for this key; (0, what is wrong) otherwise."""
    magic, found, nonce, _ = (int(word) for word in block[: _HEAD_WORDS * WORD_BYTES].view(np.uint64))
    if magic != MAGIC:
        return 0, f"asked for key {key_id:#x}, got bytes that are no payload: {block[:32].tobytes().hex()}"
    if found != key_id:
        return 0, f"asked for key {key_id:#x}, got the block of key {found:#x} (nonce {nonce:#x})"
    wrong = np.nonzero((block != fill(key_id, nonce, len(block))).reshape(-1, WORD_BYTES).any(axis=1))[0]
    if len(wrong):
        return 0, f"key {key_id:#x} nonce {nonce:#x}: {len(wrong)} of {len(block) // 8} words wrong, first {wrong[0]}"
    return nonce, ""


def trace_of(ids: list[int], nonce: int, blocks: list[npt.NDArray[np.uint8]]) -> int:
    """How many words in these blocks, beyond their heads, are those that this attempt would have written there."""
    words = 0
    found = [block.view(np.uint64)[_HEAD_WORDS:] for block in blocks]
    for key_id in ids:
        expected = fill(key_id, nonce, len(blocks[0])).view(np.uint64)[_HEAD_WORDS:]
        words += sum(int((block == expected).sum()) for block in found)
    return words
