"""Block keys: 16 bytes, chained, so that equal keys mean equal prefixes.

Pure. ``key[i] = blake2b-128(fingerprint digest, parent key, token ids of block i)``; the first block's parent is
`ROOT`. Only whole blocks get a key: a partial tail block is never stored (it would be unreadable by a longer
prompt, and measured hit rates are better without it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

KEY_BYTES = 16
ROOT = bytes(KEY_BYTES)
"""The parent of a chain's first block."""

KeyArray = npt.NDArray[np.uint8]
"""Shape ``[n, 16]``, C-contiguous."""


class BlockKeys(Sequence[bytes]):
    """A run of chained keys with their parents; slicing keeps the parents right.

    Attributes:
        keys: uint8 ``[n, 16]``, C-contiguous.
        parents: uint8 ``[n, 16]``; ``parents[i]`` is the key before ``keys[i]`` in its chain, or zeros.
    """

    __slots__ = ("keys", "parents")

    def __init__(self, keys: KeyArray, parents: KeyArray) -> None:
        _check_keys(keys)
        if parents.shape != keys.shape or parents.dtype != np.uint8:
            raise ValueError(f"parents must match keys, got {parents.dtype} {list(parents.shape)}")
        self.keys = np.ascontiguousarray(keys)
        self.parents = np.ascontiguousarray(parents)

    @classmethod
    def chain(cls, keys: KeyArray, parent: bytes = ROOT) -> BlockKeys:
        """Keys in order, each the parent of the next; `parent` precedes the first."""
        parents = np.empty_like(keys)
        if len(keys):
            parents[0] = np.frombuffer(parent, np.uint8)
            parents[1:] = keys[:-1]
        return cls(keys, parents)

    @classmethod
    def parse(cls, keys: BlockKeys | Sequence[bytes] | KeyArray) -> BlockKeys:
        """Accept what callers have: `BlockKeys`, a sequence of 16-byte ``bytes``, or uint8 ``[n, 16]``.

        Raises:
            ValueError: a key is not 16 bytes, or the array has another shape or dtype.
        """
        if isinstance(keys, BlockKeys):
            return keys
        if isinstance(keys, np.ndarray):
            _check_keys(keys)
            return cls.chain(np.ascontiguousarray(keys))
        if isinstance(keys, (bytes, bytearray, str)):
            raise ValueError("keys must be a sequence of 16-byte keys; for one key pass [key]")
        for position, key in enumerate(keys):
            if not isinstance(key, (bytes, bytearray)) or len(key) != KEY_BYTES:
                size = f"{len(key)} bytes" if isinstance(key, (bytes, bytearray)) else type(key).__name__
                raise ValueError(f"key {position} must be {KEY_BYTES} bytes, got {size}")
        return cls.chain(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES))

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> BlockKeys: ...
    def __getitem__(self, index: int | slice) -> bytes | BlockKeys:
        if isinstance(index, slice):
            return BlockKeys(self.keys[index], self.parents[index])
        return bytes(self.keys[index])

    def __iter__(self) -> Iterator[bytes]:
        raw = self.keys.tobytes()
        return (raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockKeys):
            return NotImplemented
        return bool(np.array_equal(self.keys, other.keys) and np.array_equal(self.parents, other.parents))

    __hash__ = None  # type: ignore[assignment]  # mutable arrays inside

    def __repr__(self) -> str:
        head = ", ".join(self.hex()[:2])
        return f"BlockKeys({len(self)} keys: {head}{', …' if len(self) > 2 else ''})"

    def hex(self) -> list[str]:
        """Each key as 32 hexadecimal digits."""
        return [key.hex() for key in self]


def _check_keys(keys: npt.NDArray[Any]) -> None:
    if keys.ndim != 2 or keys.shape[1] != KEY_BYTES or keys.dtype != np.uint8:
        raise ValueError(f"keys must be uint8 [n, 16], got {keys.dtype} {list(keys.shape)}")


def block_keys(
    fingerprint_digest: bytes,
    token_ids: Sequence[int] | npt.NDArray[Any],
    block_tokens: int,
    parent: bytes = ROOT,
) -> BlockKeys:
    """Keys of the whole blocks of a token sequence.

    Args:
        fingerprint_digest: 16 bytes; `Fingerprint.digest()`.
        token_ids: the prompt's ids, each in ``[0, 2**32)``; a tail shorter than a block gets no key.
        block_tokens: tokens in a block, at least 1.
        parent: key of the block before ``token_ids[0]``; `ROOT` at the start of a prompt.

    Raises:
        ValueError: an id is out of range or not an integer, `block_tokens` < 1, or `parent` is not 16 bytes.
    """
    if block_tokens < 1:
        raise ValueError(f"block_tokens must be at least 1, got {block_tokens}")
    if len(parent) != KEY_BYTES:
        raise ValueError(f"parent must be {KEY_BYTES} bytes, got {len(parent)}")
    ids = np.asarray(token_ids)
    if ids.ndim != 1:
        raise ValueError(f"token_ids must be one-dimensional, got shape {list(ids.shape)}")
    if ids.size and (ids.dtype.kind not in "iu" or int(ids.min()) < 0 or int(ids.max()) >= 2**32):
        raise ValueError("token_ids must be integers in [0, 2**32)")
    packed = ids.astype("<u4").tobytes()
    step = 4 * block_tokens
    count = len(ids) // block_tokens
    out = bytearray()
    key = parent
    base = hashlib.blake2b(fingerprint_digest, digest_size=KEY_BYTES, person=b"memfabric-key-1")
    for i in range(count):
        state = base.copy()
        state.update(key)
        state.update(packed[i * step : (i + 1) * step])
        key = state.digest()
        out += key
    return BlockKeys.chain(np.frombuffer(bytes(out), np.uint8).reshape(-1, KEY_BYTES), parent)
