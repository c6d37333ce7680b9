"""Putting blocks: reserve, write the headers' first state, the payload, the headers' second state, commit.

A block becomes readable only at the commit, and only if all of it was written before the lease ended.
Whatever happens in between, an exception or a cancelled task included, the reservation is given back when the
last copy is over.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import numpy.typing as npt

from memfabric.client.copying import Checks, Copied, Positions, write_headers, write_in_order, write_payload
from memfabric.client.effects import Operation, Pause, Work
from memfabric.client.engine import Engine
from memfabric.client.memory import Memory
from memfabric.client.places import Place
from memfabric.client.reading import columns, locate, parts, usable, why_not
from memfabric.client.results import PutResult, PutStatus, StatusColumn
from memfabric.client.verify import HeaderCheck
from memfabric.core.keys import BlockKeys
from memfabric.core.layout import BlockState
from memfabric.core.messages import Commit, CommitStatus, Committed, Reserve, Reserved, ReserveStatus, Written
from memfabric.errors import RefusalCode, RefusedError, UnavailableError

Tokens = npt.NDArray[np.uint32]

PART_BYTES = 256 << 20
"""Payload of one reservation: early parts are readable while later ones are written, and a lease is never
outlived."""
PENDING_PAUSE_NS = 10_000_000
MAX_PAUSE_NS = 200_000_000

_ENDED = (RefusalCode.UNKNOWN_SESSION, RefusalCode.LEASE_EXPIRED, RefusalCode.UNKNOWN_LEASE)


@dataclasses.dataclass(slots=True)
class Reservation:
    """Blocks under a write lease.

    Attributes:
        status: uint8 ``[n]`` of `PutStatus`; STORED stands for granted until the commit says so.
        granted: positions of the granted keys, in the order of the lease.
        place: where the granted blocks are.
        reachable: bool per granted block: it can be written from here.
        lease: its id, 0 when nothing was granted.
        deadline_ns: when it ends, on this process's CLOCK_MONOTONIC.
        message: why keys were not granted or cannot be reached.
        retry_after_ns: the server's advice for blocks without space; 0 for none.
    """

    status: StatusColumn
    granted: Positions
    place: Place
    reachable: npt.NDArray[np.bool_]
    lease: int
    deadline_ns: int
    message: str
    retry_after_ns: int


def reserve(engine: Engine, keys: BlockKeys, tokens: Tokens, ttl_ns: int, deadline_ns: int) -> Operation[Reservation]:
    """Lease fresh blocks, at most a request's worth. The caller commits or gives the lease back."""
    n = len(keys)
    reply, answer = yield from engine.call(
        Reserve(keys=keys.keys.tobytes(), parents=keys.parents.tobytes(), tokens=tokens.tobytes(), ttl_ns=ttl_ns),
        Reserved,
        deadline_ns,
    )
    if reply.lease:
        engine.hold(reply.lease, writing=True)
    try:
        status = columns(reply.status, np.uint8, n).copy()  # the codes of ReserveStatus and PutStatus agree up to QUOTA
        granted = np.nonzero(status == ReserveStatus.GRANTED)[0]
        place = yield from locate(engine, reply, answer.epoch, n, granted, deadline_ns)
        reachable = yield from usable(engine, place, True, deadline_ns)
        message = reply.message
        if not reachable.all():
            status[granted[~reachable]] = PutStatus.UNREACHABLE
            message = "; ".join(text for text in (message, why_not(engine, place, reachable)) if text)
    except BaseException:
        if reply.lease:
            engine.give_back(reply.lease, writing=True)
        raise
    until_ns = answer.sent_ns + reply.ttl_ns
    return Reservation(status, granted, place, reachable, reply.lease, until_ns, message, reply.retry_after_ns)


def commit(
    engine: Engine, reservation: Reservation, written: npt.NDArray[np.bool_], unknown: bool, deadline_ns: int
) -> Operation[Checks]:
    """Make written blocks readable; `written` and the result (`CommitStatus`) are per granted block.

    Args:
        unknown: whether something of the blocks that were not written may still arrive.

    Raises:
        RefusedError: the lease has ended; nothing became readable. OutcomeUnknownError: no answer.
    """
    not_written = Written.UNKNOWN if unknown else Written.NO
    mask = np.where(written, np.uint8(Written.YES), np.uint8(not_written)).tobytes()
    reply, _ = yield from engine.call(Commit(lease=reservation.lease, stored=mask), Committed, deadline_ns)
    engine.forget_lease(reservation.lease)
    return columns(reply.status, np.uint8, len(written))


def put(
    engine: Engine, keys: BlockKeys, memory: Memory, tokens: Tokens, wait: bool, deadline_ns: int
) -> Operation[PutResult]:
    """Store blocks; see `Client.put`."""
    n = len(keys)
    status = np.full(n, PutStatus.LOST, np.uint8)
    todo: Positions = np.arange(n)
    retry_ns, pause_ns, message, waited = 0, PENDING_PAUSE_NS, "", False
    while len(todo):
        before, retry_ns = message, 0
        try:
            message = ""
            for part in parts(engine, len(todo), PART_BYTES):
                why, after_ns = yield from _put_part(engine, keys, memory, tokens, status, todo[part], deadline_ns)
                message, retry_ns = why or message, max(retry_ns, after_ns)
        except (UnavailableError, RefusedError) as error:
            if waited and isinstance(error, UnavailableError) and time.monotonic_ns() >= deadline_ns:
                message = before  # the time to wait is over; what was found out before it holds
            elif (status == PutStatus.STORED).any():
                message = str(error)  # "nothing happened" would be false by now: the statuses say what did
            else:
                raise
            break
        open_ = np.isin(status[todo], (PutStatus.PENDING, PutStatus.NO_SPACE, PutStatus.QUOTA))
        todo = todo[open_]
        left_ns = deadline_ns - time.monotonic_ns()
        if not wait or not len(todo) or left_ns <= 0:
            break
        waited = True
        yield Pause(min(max(retry_ns, pause_ns), left_ns, MAX_PAUSE_NS))
        pause_ns = min(2 * pause_ns, MAX_PAUSE_NS)
    stored = int((status == PutStatus.STORED).sum())
    exists = int((status == PutStatus.EXISTS).sum())
    lost = int((status == PutStatus.LOST).sum())
    size = stored * engine.shape.block_bytes
    engine.count(
        puts=1,
        put_blocks=stored,
        put_bytes=size,
        existing_blocks=exists,
        lost_blocks=lost,
        refused_blocks=n - stored - exists - lost,
    )
    return PutResult(status, size, message, retry_ns / 1e9 if retry_ns else None)


def _put_part(
    engine: Engine,
    keys: BlockKeys,
    memory: Memory,
    tokens: Tokens,
    status: StatusColumn,
    at: Positions,
    deadline_ns: int,
) -> Operation[tuple[str, int]]:
    """Store one part, once more if the session or the lease ended meanwhile; (message, advice for a retry in
    ns)."""
    why = ""
    for _ in range(2):
        some = BlockKeys(keys.keys[at], keys.parents[at])
        reservation = yield from reserve(engine, some, tokens[at], engine.lease_ns(None), deadline_ns)
        status[at] = reservation.status
        if not reservation.lease:
            return reservation.message or why, reservation.retry_after_ns
        granted = at[reservation.granted]
        unknown = True  # until the write has told
        try:
            written, why, unknown = yield from _write(engine, some, tokens[at], memory.select(granted), reservation)
            outcome = yield from commit(engine, reservation, written, unknown, deadline_ns)
        except RefusedError as error:
            if error.code not in _ENDED:
                raise
            outcome, why = np.full(len(granted), CommitStatus.LOST, np.uint8), str(error)
        finally:
            # Also after a commit whose outcome is unknown: if it happened, there is nothing left to abort.
            if reservation.lease in engine.leases:
                engine.give_back(reservation.lease, writing=True, flushed=not unknown)
        _conclude(engine, some, reservation, outcome, status, granted)
        lost = status[granted] == PutStatus.LOST
        if not lost.any() or time.monotonic_ns() >= deadline_ns:
            break
        at = granted[lost]
    return reservation.message or why, reservation.retry_after_ns


def _write(
    engine: Engine, keys: BlockKeys, tokens: Tokens, memory: Memory, reservation: Reservation
) -> Operation[tuple[npt.NDArray[np.bool_], str, bool]]:
    """Write all granted blocks that can be reached; which were written whole before the lease ended, why not all, and
    whether something may still arrive."""
    written = reservation.reachable.copy()
    pick = np.nonzero(written)[0]
    if not len(pick):
        return written, "", False
    whole = len(pick) == len(written)
    place = reservation.place if whole else reservation.place.select(pick)
    memory = memory if whole else memory.select(pick)
    at = reservation.granted[pick]
    block_keys, block_tokens = BlockKeys(keys.keys[at], keys.parents[at]), tokens[at]

    def work() -> Copied:
        return write_blocks(engine, block_keys, place, block_tokens, memory, reservation.deadline_ns)

    copied: Copied = yield Work(work, len(pick) * engine.shape.block_bytes)
    written[pick] = copied.checks == HeaderCheck.OK
    if time.monotonic_ns() >= reservation.deadline_ns:
        written[:] = False
        return written, "the lease ended before the blocks were written", copied.unknown
    return written, copied.message, copied.unknown


def write_blocks(
    engine: Engine, keys: BlockKeys, place: Place, tokens: Tokens, memory: Memory, deadline_ns: int
) -> Copied:
    """Header (writing), payload, header (complete): three batches, each visible before the next begins."""
    claims = engine.transport.capabilities
    if claims.ordered and not claims.inline_digest and memory.device is None:  # then nobody has to wait in between
        copied = write_in_order(engine, keys, place, tokens, memory, deadline_ns)
        if copied is not None:
            return copied
    begun = write_headers(engine, keys, place, tokens, BlockState.WRITING, None, deadline_ns)
    payload = write_payload(engine, place, memory, deadline_ns)
    unknown = begun.unknown or payload.unknown
    if begun.good == payload.good == len(keys):
        return write_headers(engine, keys, place, tokens, BlockState.COMPLETE, payload.digests, deadline_ns)
    checks = np.maximum(begun.checks, payload.checks)
    at = np.nonzero(checks == HeaderCheck.OK)[0]
    message = begun.message or payload.message
    if len(at) and payload.digests is not None:
        some = BlockKeys(keys.keys[at], keys.parents[at])
        digests = payload.digests.reshape(len(keys), -1)[at].reshape(-1)
        ended = write_headers(engine, some, place.select(at), tokens[at], BlockState.COMPLETE, digests, deadline_ns)
        checks[at] = ended.checks
        message, unknown = message or ended.message, unknown or ended.unknown
    return Copied(checks, int((checks == HeaderCheck.OK).sum()), None, message, unknown)


def _conclude(
    engine: Engine,
    keys: BlockKeys,
    reservation: Reservation,
    outcome: Checks,
    status: StatusColumn,
    granted: Positions,
) -> None:
    """Statuses after a commit; what is stored is known from now on."""
    stored = outcome == CommitStatus.STORED
    final = np.where(stored, np.uint8(PutStatus.STORED), np.uint8(PutStatus.LOST))
    final[~reservation.reachable] = PutStatus.UNREACHABLE
    status[granted] = final
    engine.places.learn(keys.keys[reservation.granted[stored]], reservation.place.select(stored))
