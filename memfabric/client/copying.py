"""The data path: batches of one-sided copies between places in the pool and the caller's memory, with their
checks.

Plain functions that block for as long as a copy takes; operations run them as work. They never raise for what
the pool's side does: each block gets a `HeaderCheck`, and a reason in words where there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from memfabric import _native
from memfabric.client.engine import Engine
from memfabric.client.memory import Memory
from memfabric.client.places import Place
from memfabric.client.verify import HeaderCheck
from memfabric.core.keys import BlockKeys, KeyArray
from memfabric.core.layout import BlockState
from transport.base import DONE, NOT_DONE, Batch, Outcome, Pending, outcome
from transport.errors import TransportError

MERGE_BYTES = 1 << 20
"""Neighbouring blocks are copied as one up to this size, so that threads and deadlines keep something to
divide."""

_UNKNOWN = [status for status in range(16) if outcome(status) is Outcome.UNKNOWN]

Checks = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.intp]


@dataclasses.dataclass(frozen=True, slots=True)
class Copied:
    """Outcome of a batch.

    Attributes:
        checks: `HeaderCheck` per block; for writes OK or NOT_READ (not written).
        good: how many are OK.
        digests: u64 ``[n × segments of the memory]`` of what was copied, or None.
        message: why blocks were not copied.
        unknown: writes only: whether something of it may still arrive (a connection was lost, say).
    """

    checks: Checks
    good: int
    digests: npt.NDArray[np.uint64] | None = None
    message: str = ""
    unknown: bool = False


def read_blocks(engine: Engine, keys: KeyArray, place: Place, memory: Memory, deadline_ns: int, verify: bool) -> Copied:
    """Read blocks and their headers, and check them.

    With `verify` the digests of what landed are held against the header, whichever was read first. Without,
    the header is read after the payload: if it still shows the expected generation, complete, then nobody had
    begun to write meanwhile.

    Args:
        keys, place: of the n blocks.
        memory: where to, for the same n blocks.
        deadline_ns: what is not begun by then is not read; 0 for none.
    """
    n = len(keys)
    stride, header_bytes = engine.header_stride, engine.header_bytes
    headers = np.empty(n * stride, np.uint8)
    digests = np.empty(n * memory.segment_count, np.uint64) if verify else None
    try:
        batch = _batch(engine, False, place, memory, verify, digests, int(headers.ctypes.data), stride, header_bytes)
        transport, threads = engine.transport, engine.settings.copy_threads
        if verify and memory.device is None:
            done = transport.read(batch, deadline_ns, threads) == len(batch)
        else:
            payload, header = _split(batch, len(batch) - n, memory.kind)
            done = _move(engine, False, payload, memory, deadline_ns) == len(payload)
            done = transport.read(header, deadline_ns, 1) == n and done
            batch.status = np.concatenate([payload.status, header.status])
            batch.error = payload.error or header.error
    except (TransportError, IndexError) as error:
        return _by_region(
            place,
            error,
            lambda at: read_blocks(engine, keys[at], place.select(at), memory.select(at), deadline_ns, verify),
        )
    checks = np.empty(n, np.uint8)
    good = _native.check_headers(
        headers,
        stride,
        engine.shape.segments,
        engine.shape.block_bytes,
        keys,
        place.generation,
        memory.first_segment,
        memory.segment_count,
        digests,
        checks,
    )
    if not done:
        checks[_unfinished(batch, n, memory.segment_count, verify)] = HeaderCheck.NOT_READ
        good = int((checks == HeaderCheck.OK).sum())
    return Copied(checks, good, digests, "" if done else str(batch.error))


def write_headers(
    engine: Engine,
    keys: BlockKeys,
    place: Place,
    tokens: npt.NDArray[np.uint32],
    state: BlockState,
    digests: npt.NDArray[np.uint64] | None,
    deadline_ns: int,
) -> Copied:
    """Write headers for n blocks: ``WRITING`` before the payload, ``COMPLETE`` with the digests after it."""
    n = len(keys)
    try:
        batch, _headers = _header_batch(engine, keys, place, tokens, state, digests)
        engine.transport.write(batch, deadline_ns, 1)
    except (TransportError, IndexError) as error:
        return _by_region(
            place,
            error,
            lambda at: write_headers(
                engine,
                BlockKeys(keys.keys[at], keys.parents[at]),
                place.select(at),
                tokens[at],
                state,
                None if digests is None else digests.reshape(n, -1)[at].reshape(-1),
                deadline_ns,
            ),
        )
    return _written(batch, batch.status, None)


def _header_batch(
    engine: Engine,
    keys: BlockKeys,
    place: Place,
    tokens: npt.NDArray[np.uint32],
    state: BlockState,
    digests: npt.NDArray[np.uint64] | None,
) -> tuple[Batch, npt.NDArray[np.uint8]]:
    """A batch that writes headers, and their bytes, which must live as long as the batch."""
    n, stride = len(keys), engine.header_stride
    headers = np.empty(n * stride, np.uint8)
    _native.pack_headers(
        headers,
        stride,
        engine.shape.segments,
        keys.keys,
        keys.parents,
        place.generation,
        tokens,
        engine.shape.block_bytes,
        int(state),
        digests,
    )
    nothing = Memory(np.zeros((0, 6), np.int64), np.zeros(n, np.uint64), None, n, 0, 0, ())
    return _batch(engine, True, place, nothing, False, None, int(headers.ctypes.data), stride, stride), headers


def write_in_order(
    engine: Engine, keys: BlockKeys, place: Place, tokens: npt.NDArray[np.uint32], memory: Memory, deadline_ns: int
) -> Copied | None:
    """Headers, payload and headers again, posted at once: for transports that perform batches in order and give a
    write's digests when it is posted.

    Blocks of which anything failed are not OK, whatever their headers say by then: they are never committed, and what
    their digests say holds for readers too.

    Returns:
        None: a batch was refused, because of a region that is gone, say; everything is to be written again.
    """
    n = len(keys)
    digests = np.empty(memory.count * memory.segment_count, np.uint64)
    posted: list[tuple[Batch, Pending]] = []

    def post(batch: Batch) -> None:
        posted.append((batch, engine.transport.post_write(batch, deadline_ns, 1)))

    try:
        begin, begin_bytes = _header_batch(engine, keys, place, tokens, BlockState.WRITING, None)
        post(begin)
        post(_batch(engine, True, place, memory, True, digests, 0, 0, 0))
        # Packed from a copy: of a payload that fails on its way the digests are taken back.
        end, end_bytes = _header_batch(engine, keys, place, tokens, BlockState.COMPLETE, digests.copy())
        post(end)
    except (TransportError, IndexError):
        for _, pending in posted:
            pending.abandon()
        return None
    except BaseException:
        for _, pending in posted:
            pending.abandon()
        raise
    try:
        done = [pending.wait() == len(batch) for batch, pending in posted]
    except BaseException:  # interrupted: nothing may touch the caller's memory any more
        for _, pending in posted:
            pending.abandon()
        raise
    del begin_bytes, end_bytes  # until here
    if all(done):
        return Copied(np.zeros(n, np.uint8), n, digests)
    (begin, _), (payload, _), (end, _) = posted
    bad = (begin.status != DONE) | (end.status != DONE)
    if not done[1]:
        bad |= _unfinished(payload, n, memory.segment_count, True)
    checks = np.where(bad, np.uint8(HeaderCheck.NOT_READ), np.uint8(HeaderCheck.OK))
    unknown = any(np.isin(batch.status, _UNKNOWN).any() for batch, _ in posted)
    why = next(str(batch.error) for batch, _ in posted if batch.error is not None)
    good = int((checks == HeaderCheck.OK).sum())
    return Copied(checks, good, digests, f"not everything was written: {why}", bool(unknown))


def write_payload(engine: Engine, place: Place, memory: Memory, deadline_ns: int) -> Copied:
    """Write the memory's segments of n blocks; the result's digests are of what was written."""
    digests = np.empty(memory.count * memory.segment_count, np.uint64)
    try:
        batch = _batch(engine, True, place, memory, True, digests, 0, 0, 0)
        batch.kind = memory.kind
        done = _move(engine, True, batch, memory, deadline_ns) == len(batch)
    except (TransportError, IndexError) as error:
        return _by_region(
            place,
            error,
            lambda at: write_payload(engine, place.select(at), memory.select(at), deadline_ns),
            memory.segment_count,
        )
    status = np.zeros(memory.count, np.uint8)
    if not done:
        status[_unfinished(batch, memory.count, memory.segment_count, True)] = NOT_DONE
    return _written(batch, status, digests)


def _batch(
    engine: Engine,
    writable: bool,
    place: Place,
    memory: Memory,
    groups: bool,
    digests: npt.NDArray[np.uint64] | None,
    header_local: int,
    header_stride: int,
    header_bytes: int,
) -> Batch:
    shape = engine.shape
    most = memory.count * (len(memory.fragments) + 1)
    local, offset, length = np.empty(most, np.uint64), np.empty(most, np.uint64), np.empty(most, np.uint64)
    region, group = np.empty(most, np.int32), np.empty(most, np.int32)
    count = _native.plan(
        memory.fragments,
        engine.regions.table(writable),
        place.slot,
        place.block,
        memory.block_base,
        memory.block_id,
        shape.block_bytes,
        shape.segment_bytes,
        memory.first_segment,
        memory.segment_count,
        groups,
        MERGE_BYTES if not groups else shape.block_bytes,
        header_local,
        header_stride,
        header_bytes,
        local,
        region,
        offset,
        length,
        group,
    )
    if count == most:
        return Batch(local, region, offset, length, group, digests)
    return Batch(local[:count], region[:count], offset[:count], length[:count], group[:count], digests)


def _move(engine: Engine, write: bool, batch: Batch, memory: Memory, deadline_ns: int) -> int:
    """Read or write a batch of payload; operations done."""
    threads = engine.settings.copy_threads
    if memory.device is None:
        return (engine.transport.write if write else engine.transport.read)(batch, deadline_ns, threads)
    call = engine.gpu.write if write else engine.gpu.read
    return call(memory.device, batch, deadline_ns, threads, memory.streams)


def _split(batch: Batch, at: int, kind: str) -> tuple[Batch, Batch]:
    """Payload, with its digests if it has some, and headers, which are in the host's memory whatever the payload is."""
    group = None if batch.digest is None or batch.group is None else batch.group[:at]
    return (
        Batch(
            batch.local[:at], batch.region[:at], batch.offset[:at], batch.length[:at], group, batch.digest, kind=kind
        ),
        Batch(batch.local[at:], batch.region[at:], batch.offset[at:], batch.length[at:]),
    )


def _unfinished(batch: Batch, n: int, segment_count: int, grouped: bool) -> npt.NDArray[np.bool_]:
    """Blocks of which an operation was not done; all of them where operations span blocks."""
    mask = np.zeros(n, np.bool_)
    missed = batch.status != DONE
    if not grouped:
        mask[:] = missed.any()
        return mask
    assert batch.group is not None
    payload = batch.group >= 0
    mask[batch.group[missed & payload] // segment_count] = True
    headers = missed[~payload]
    if len(headers):
        mask |= headers
    return mask


def _written(batch: Batch, status: Checks, digests: npt.NDArray[np.uint64] | None) -> Copied:
    if not status.any():  # all done, which is nearly always so: DONE is 0, and so is HeaderCheck.OK
        return Copied(status, len(status), digests)
    checks = np.where(status == DONE, np.uint8(HeaderCheck.OK), np.uint8(HeaderCheck.NOT_READ))
    good = int((checks == HeaderCheck.OK).sum())
    unknown = bool(np.isin(batch.status, _UNKNOWN).any())
    return Copied(checks, good, digests, f"not everything was written: {batch.error}", unknown)


def _by_region(place: Place, error: Exception, again: Callable[[Positions], Copied], segment_count: int = 0) -> Copied:
    """A batch was refused whole because of some region: do each region alone, so that only its own blocks
    fail."""
    n = len(place)
    slots = np.unique(place.slot)
    checks = np.full(n, HeaderCheck.NOT_READ, np.uint8)
    digests = np.zeros((n, segment_count), np.uint64) if segment_count else None
    if len(slots) == 1:
        return Copied(checks, 0, None if digests is None else digests.reshape(-1), str(error))
    messages, unknown = [], False
    for slot in slots:
        at = np.nonzero(place.slot == slot)[0]
        part = again(at)
        checks[at] = part.checks
        if digests is not None and part.digests is not None:
            digests[at] = part.digests.reshape(len(at), segment_count)
        messages.append(part.message)
        unknown = unknown or part.unknown
    good = int((checks == HeaderCheck.OK).sum())
    flat = None if digests is None else digests.reshape(-1)
    return Copied(checks, good, flat, "; ".join(dict.fromkeys(text for text in messages if text)), unknown)
