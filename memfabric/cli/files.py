"""Files in and out of a pool: a file is a chain of blocks; nothing of it is stored or written unless it fits.

Responsible for cutting files into batches of blocks and for the keys of content that has no token ids. Bytes are
handled `BATCH_BYTES` at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memfabric import units
from memfabric.cli.output import plural
from memfabric.client import GetStatus
from memfabric.core.keys import KEY_BYTES, ROOT, BlockKeys
from memfabric.errors import MemfabricError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from memfabric.client import Client, GetResult, PutResult

BATCH_BYTES = 64 << 20
_PERSON = b"memfabric-put-1"
_SHOWN_KEYS = 3


def batch_blocks(block_bytes: int) -> int:
    """Blocks of one batch."""
    return max(1, min(4096, BATCH_BYTES // block_bytes))


def content_keys(fingerprint_digest: bytes, blocks: npt.NDArray[np.uint8], parent: bytes = ROOT) -> BlockKeys:
    """Keys of blocks that have no token ids: ``blake2b-128(fingerprint digest, parent key, content)``, chained.

    Args:
        fingerprint_digest: 16 bytes, of the namespace.
        blocks: uint8 ``[n, block_bytes]``, C-contiguous.
        parent: key of the block before the first.
    """
    out = bytearray()
    key = parent
    base = hashlib.blake2b(fingerprint_digest, digest_size=KEY_BYTES, person=_PERSON)
    for block in blocks:
        state = base.copy()
        state.update(key)
        state.update(block.data)
        key = state.digest()
        out += key
    return BlockKeys.chain(np.frombuffer(bytes(out), np.uint8).reshape(-1, KEY_BYTES), parent)


class Upload:
    """Stores a stream as a chain of blocks.

    Attributes:
        padding_bytes: zeros that were appended to fill the last block; known once `run` has begun.
    """

    def __init__(
        self,
        client: Client,
        *,
        key: bytes | None = None,
        parent: bytes | None = None,
        tokens: Sequence[int] | None = None,
        pad: bool = False,
    ) -> None:
        """Prepare; nothing is read or sent.

        Args:
            client: of the namespace; stays the caller's.
            key: store one block under this key.
            parent: key of the block before the first; None for the start of a chain.
            tokens: token ids whose whole blocks give the keys.
            pad: fill the last block with zeros instead of refusing.
        """
        self._client = client
        self._spec = client.namespace
        self._key = key
        self._parent = ROOT if parent is None else parent
        self._tokens = tokens
        self._pad = pad
        self.padding_bytes = 0

    def run(self, stream: IO[bytes], name: str) -> Iterator[tuple[BlockKeys, PutResult]]:
        """Store all of `stream`; yields keys and results batch by batch. `name` stands in messages.

        Raises:
            UsageError: the stream is empty, is not whole blocks, or does not match the key or the tokens. Nothing was
                stored.
        """
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(_seekable(stream))
            size_bytes = source.seek(0, os.SEEK_END)
            source.seek(0)
            total = self._count_blocks(size_bytes, name)
            block_bytes = self._spec.block_bytes
            given = self._given_keys(total, name)
            step = min(total, batch_blocks(block_bytes))
            buffer = np.zeros((step, block_bytes), np.uint8)
            parent = self._parent
            for start in range(0, total, step):
                blocks = buffer[: min(step, total - start)]
                filled = _fill(source, blocks.data.cast("B"))
                if start * block_bytes + filled != min(size_bytes, (start + len(blocks)) * block_bytes):
                    raise MemfabricError(f"{name} changed while it was read; blocks before that are stored")
                if given is None:
                    keys = content_keys(self._spec.fingerprint.digest(), blocks, parent)
                else:
                    keys = given[start : start + len(blocks)]
                parent = keys[len(keys) - 1]
                yield keys, self._client.put(keys, blocks)

    def _count_blocks(self, size_bytes: int, name: str) -> int:
        block_bytes = self._spec.block_bytes
        if size_bytes == 0:
            raise UsageError(f"{name} is empty; there is nothing to store")
        rest = size_bytes % block_bytes
        total = -(-size_bytes // block_bytes)
        if rest and not self._pad:
            raise UsageError(
                f"{name} has {size_bytes:,} bytes: {plural(size_bytes // block_bytes, 'block')} of "
                f"{block_bytes:,} bytes and {rest:,} more. "
                f"Say --pad to fill the last block with {block_bytes - rest:,} zero bytes"
            )
        self.padding_bytes = block_bytes - rest if rest else 0
        return total

    def _given_keys(self, total: int, name: str) -> BlockKeys | None:
        if self._key is not None:
            if total != 1:
                raise UsageError(
                    f"--key names one block, and {name} has {total}; a block of namespace "
                    f"{self._spec.name} has {units.format_bytes(self._spec.block_bytes)}"
                )
            return BlockKeys.chain(np.frombuffer(self._key, np.uint8).reshape(1, KEY_BYTES), self._parent)
        if self._tokens is None:
            return None
        keys = self._client.block_keys(self._tokens, parent=self._parent)
        if len(keys) != total:
            raise UsageError(
                f"{plural(len(self._tokens), 'token')} make {plural(len(keys), 'whole block')} of "
                f"{self._spec.block_tokens}, but {name} has {total}"
            )
        return keys


def download(client: Client, keys: Sequence[bytes], output: str, total_bytes: int) -> int:
    """Write the first `total_bytes` bytes of the blocks to a file or, for ``-``, to standard output.

    Returns:
        Bytes written.

    Raises:
        MemfabricError: a block is missing or did not verify. An existing file is as it was; standard output has got
            whole, verified batches before that.
    """
    with _writer(output) as sink:
        left = total_bytes
        step = batch_blocks(client.namespace.block_bytes)
        for start in range(0, len(keys), step):
            part = keys[start : start + step]
            result = client.get(part)
            if not result.ok:
                raise _why_not_read(client, part, result)
            data = memoryview(result.out).cast("B")[:left]
            sink.write(data)
            left -= len(data)
        sink.flush()
    return total_bytes


def _why_not_read(client: Client, keys: Sequence[bytes], result: GetResult) -> MemfabricError:
    statuses = [GetStatus(value) for value in result.status.tolist()]
    parts = []
    for kind in GetStatus:
        hit = [key.hex() for key, status in zip(keys, statuses, strict=True) if status is kind]
        if hit and kind is not GetStatus.OK:
            shown = ", ".join(hit[:_SHOWN_KEYS]) + (", …" if len(hit) > _SHOWN_KEYS else "")
            parts.append(f"{plural(len(hit), 'block')} {kind.name.lower()} ({shown})")
    why = f": {result.message}" if result.message else ""
    return MemfabricError(f"namespace {client.namespace.name}: {'; '.join(parts)}{why}")


@contextlib.contextmanager
def _seekable(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """The stream itself, or a copy of it in a temporary file when its size cannot be known before."""
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy, 1 << 20)
        yield copy


def _fill(source: IO[bytes], target: memoryview) -> int:
    """Read until the target is full or the source ends; the rest of the target becomes zeros."""
    filled = 0
    while filled < len(target):
        data = source.read(min(1 << 20, len(target) - filled))
        if not data:
            break
        target[filled : filled + len(data)] = data
        filled += len(data)
    target[filled:] = bytes(len(target) - filled)
    return filled


@contextlib.contextmanager
def _writer(output: str) -> Iterator[IO[bytes]]:
    """Standard output, or a file that gets its new content whole or not at all."""
    if output == "-":
        yield sys.stdout.buffer
        return
    path = Path(output).resolve()
    if path.exists() and not path.is_file():  # a device or a pipe can't be replaced
        with path.open("wb") as sink:
            yield sink
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("xb") as sink:
            yield sink
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
