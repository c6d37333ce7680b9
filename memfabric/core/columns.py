"""Packed columns of messages: checked on the way in, packed on the way out.

Pure. Every check is against what a peer may have sent: wrong lengths, counts over the limit, duplicates, the null key.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from memfabric import _native
from memfabric.core.keys import KEY_BYTES, KeyArray
from memfabric.core.messages import MAX_KEYS_PER_REQUEST
from memfabric.errors import RefusalCode, RefusedError


def _refuse(message: str) -> RefusedError:
    return RefusedError(RefusalCode.BAD_REQUEST, message)


def keys(raw: bytes, what: str = "keys") -> KeyArray:
    """uint8 ``[n, 16]`` over the message's bytes (read-only), 0 < n <= `MAX_KEYS_PER_REQUEST`.

    Raises:
        RefusedError: not a multiple of 16 bytes, empty, or too many.
    """
    if len(raw) % KEY_BYTES:
        raise _refuse(f"{what}: {len(raw)} bytes is not a multiple of {KEY_BYTES}")
    count = len(raw) // KEY_BYTES
    if not 0 < count <= MAX_KEYS_PER_REQUEST:
        raise _refuse(f"{what}: {count} in one request; 1 to {MAX_KEYS_PER_REQUEST} are allowed")
    return np.frombuffer(raw, np.uint8).reshape(count, KEY_BYTES)


def column(raw: bytes, dtype: Any, count: int, what: str) -> npt.NDArray[Any]:
    """A column of exactly `count` values (read-only view).

    Raises:
        RefusedError: another length.
    """
    size = np.dtype(dtype).itemsize
    if len(raw) != size * count:
        raise _refuse(f"{what}: {len(raw)} bytes for {count} blocks, expected {size * count}")
    return np.frombuffer(raw, dtype)


def distinct(array: KeyArray) -> None:
    """Refuse a batch that has a key twice, or the null key (which means "no parent").

    Raises:
        RefusedError: says which positions.
    """
    first = _native.first_positions(array)
    repeated = first != np.arange(len(array))
    if repeated.any():
        position = int(np.argmax(repeated))
        raise _refuse(
            f"key {array[position].tobytes().hex()} is in the batch twice, at {int(first[position])} and {position}"
        )
    null = ~array.any(axis=1)
    if null.any():
        raise _refuse(f"key {int(np.argmax(null))} is all zeros, which is reserved for the root")
