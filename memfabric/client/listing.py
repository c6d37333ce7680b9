"""Looking at the pool: listings and explanations."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from memfabric.client.effects import Operation
from memfabric.client.engine import Engine
from memfabric.client.reading import columns
from memfabric.core.keys import KEY_BYTES, BlockKeys
from memfabric.core.messages import MAX_KEYS_PER_REQUEST, Blocks, Document, Explain, ListBlocks
from memfabric.errors import UsageError


@dataclasses.dataclass(frozen=True, slots=True)
class BlockPage:
    """Some readable blocks, in parallel columns.

    Attributes:
        keys: keys with their parents.
        region: u32, the server's number of the region. block: u32, place in the region.
        tokens: u32. reuse: u32, uses since it was stored. age_ns: u64, time since the last use.
    """

    keys: BlockKeys
    region: npt.NDArray[np.uint32]
    block: npt.NDArray[np.uint32]
    tokens: npt.NDArray[np.uint32]
    reuse: npt.NDArray[np.uint32]
    age_ns: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.keys)


def page(engine: Engine, cursor: int, limit: int, deadline_ns: int) -> Operation[tuple[BlockPage, int | None]]:
    """One page and the cursor of the next, None at the end."""
    if not 1 <= limit <= MAX_KEYS_PER_REQUEST:
        raise UsageError(f"page must be 1 to {MAX_KEYS_PER_REQUEST}, got {limit}")
    reply, _ = yield from engine.call(ListBlocks(cursor=cursor, limit=limit), Blocks, deadline_ns)
    count = len(reply.keys) // KEY_BYTES
    keys = BlockKeys(
        columns(reply.keys, np.uint8, count * KEY_BYTES).reshape(-1, KEY_BYTES),
        columns(reply.parents, np.uint8, count * KEY_BYTES).reshape(-1, KEY_BYTES),
    )
    found = BlockPage(
        keys,
        columns(reply.region, np.uint32, count),
        columns(reply.block, np.uint32, count),
        columns(reply.tokens, np.uint32, count),
        columns(reply.reuse, np.uint32, count),
        columns(reply.age_ns, np.uint64, count),
    )
    return found, reply.cursor or None


def explain(engine: Engine, key: bytes | str, deadline_ns: int) -> Operation[dict[str, object]]:
    """Everything the server knows about a key."""
    reply, _ = yield from engine.call(Explain(key=one_key(key)), Document, deadline_ns)
    return reply.doc


def one_key(key: bytes | str) -> bytes:
    """A key given as 16 bytes or 32 hexadecimal digits.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(key, str):
        try:
            key = bytes.fromhex(key)
        except ValueError:
            raise UsageError(f"key {key!r} is not hexadecimal") from None
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise UsageError(f"a key has {KEY_BYTES} bytes or {2 * KEY_BYTES} hexadecimal digits, got {key!r}")
    return key
