"""The way of one batch through staging memory: slots, their hand-over between device and transport, what became of it.

Invariants:
- A slot's pinned buffer is either the stream's or the transport's: handed over by `Stream.wait`, or when the
  transport's operations are terminal.
- When `Pipeline.read`, `write` or `direct` has returned or raised, nothing touches the caller's memory any more.
- Nothing of a read is scattered but what arrived.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from transport import _digests
from transport.base import DONE, NOT_DONE, PEER_LOST, TIMED_OUT, Batch, Pending, Transport, UInt64Column
from transport.errors import TimedOutError, TransportError
from transport.gpu import parts
from transport.gpu.device import Device, DeviceError
from transport.gpu.parts import Layout, Pieces, Positions
from transport.gpu.plan import OPERATION_BYTES, STREAM_BYTES, SUM_BYTES, MovePlan, finish, make_plan

KIND = "cuda"
"""Of batches whose local memory is a device's."""


class Call:
    """One batch on its way: what became of its pieces, and their digests' sums."""

    def __init__(
        self,
        transport: Transport,
        write: bool,
        batch: Batch,
        pieces: Pieces,
        sums: UInt64Column,
        deadline_ns: int,
        threads: int,
        follow: list[int],
    ) -> None:
        self.write, self.batch, self.pieces, self.sums, self.follow = write, batch, pieces, sums, follow
        self.deadline_ns, self._threads = deadline_ns, threads
        self._post = transport.post_write if write else transport.post_read
        self.status = np.full(len(pieces), NOT_DONE, np.uint8)
        self.parts_count = 0

    def late(self) -> bool:
        """Whether the deadline has passed; then that is why."""
        if not self.deadline_ns or time.monotonic_ns() < self.deadline_ns:
            return False
        self.fail(TimedOutError("the deadline passed before all parts had been staged"))
        return True

    def fail(self, error: TransportError) -> None:
        """Note why not everything is done; the first reason counts."""
        self.batch.error = self.batch.error or error

    def post(self, batch: Batch) -> Pending | None:
        """Post a part; None where it was refused, because a region went away meanwhile."""
        try:
            return self._post(batch, self.deadline_ns, self._threads)
        except TransportError as error:
            self.fail(error)
            return None

    def add(self, plan: MovePlan, sums: UInt64Column) -> None:
        """Take the sums of a part."""
        self.sums[plan.groups] += sums

    @property
    def done_bytes(self) -> int:
        """Of all pieces that are done."""
        return int(self.pieces.length[self.status == DONE].sum())

    def conclude(self) -> int:
        """Fill the batch's status and digest columns; how many operations are done."""
        batch, pieces, status = self.batch, self.pieces, self.status
        done = status == DONE
        if not done.all():
            n = len(batch)
            missing = np.bincount(pieces.operation[~done], minlength=n)
            some = np.bincount(pieces.operation[done], minlength=n) > 0
            worst = np.zeros(n, np.uint8)
            np.maximum.at(worst, pieces.operation, status)
            for unknown in (TIMED_OUT, PEER_LOST):  # what is unknown of a part is unknown of the whole
                worst[pieces.operation[status == unknown]] = unknown
            # Performed in part: neither applied nor not.
            cut_off = TIMED_OUT if isinstance(batch.error, TimedOutError) else PEER_LOST
            worst[some & ~np.isin(worst, (TIMED_OUT, PEER_LOST))] = cut_off
            batch.status[pieces.operation] = np.where(missing > 0, worst, DONE)[pieces.operation]
        else:
            batch.status[pieces.operation] = DONE
        if batch.digest is not None:
            size = np.zeros(len(batch.digest), np.uint64)
            hashed = pieces.group >= 0
            np.add.at(size, pieces.group[hashed], pieces.length[hashed])
            batch.digest[:] = finish(self.sums, size)
            _digests.drop_unfinished(batch)
        count = int((batch.status == DONE).sum())
        if count == len(batch):
            batch.error = None
        return count


class _Part:
    """A part in a slot.

    Attributes:
        at: Its pieces. run: For each of them, its operation in `batch`.
        layout, plan: In staging memory.
        batch, pending: Once it was posted.
        arrived: Of a read, the pieces that are being scattered.
    """

    def __init__(self, at: slice, run: Positions, layout: Layout | None = None) -> None:
        self.at, self.run, self.layout = at, run, layout
        self.plan: MovePlan | None = None
        self.batch: Batch | None = None
        self.pending: Pending | None = None
        self.arrived: Positions = np.zeros(0, np.intp)


class _Slot:
    """Staging memory of one part: payload, then plan, in pinned and in device memory alike; and a stream."""

    def __init__(self, device: Device, part_bytes: int, most_pieces: int) -> None:
        self._plan_at = part_bytes + -part_bytes % 256
        size_bytes = self._plan_at + most_pieces * (OPERATION_BYTES + STREAM_BYTES + SUM_BYTES)
        self.size_bytes = size_bytes
        self.pinned = device.pin(size_bytes)
        self.memory = device.allocate(size_bytes)
        self.stream = device.stream()
        self.part: _Part | None = None

    def up(self, plan: MovePlan) -> int:
        """Copy a plan to the device; its address there."""
        at = self._plan_at
        self.pinned.array[at : at + plan.size_bytes] = plan.words.view(np.uint8)
        self.stream.copy(self.memory.address + at, self.pinned.address + at, plan.size_bytes)
        return self.memory.address + at

    def down(self, plan: MovePlan) -> None:
        """Copy a plan's sums back."""
        at, size_bytes = self._plan_at + plan.sums_offset, len(plan.groups) * SUM_BYTES
        if size_bytes:
            self.stream.copy(self.pinned.address + at, self.memory.address + at, size_bytes)

    def sums(self, plan: MovePlan) -> UInt64Column:
        """The sums, once the stream was waited for."""
        at, size_bytes = self._plan_at + plan.sums_offset, len(plan.groups) * SUM_BYTES
        return self.pinned.array[at : at + size_bytes].view(np.uint64)

    def batch(self, layout: Layout) -> Batch:
        """A part's runs, between pinned memory and regions."""
        local = layout.run_position + np.uint64(self.pinned.address)
        return Batch(local, layout.run_region, layout.run_offset, layout.run_length)


class Pipeline:
    """The slots of one call at a time.

    Attributes:
        broken: A stream failed, or it is not known what is on it.
    """

    def __init__(self, transport: Transport, device: Device, part_bytes: int, cell: int, slots: int) -> None:
        self._transport, self._device = transport, device
        self._part_bytes, self._most_pieces = part_bytes, cell
        self._slots = [_Slot(device, part_bytes, cell) for _ in range(slots)]
        self.broken = False
        for slot in self._slots:
            transport.prepare(slot.pinned.address, slot.size_bytes)

    def close(self) -> None:
        """Give the memory back."""
        for slot in self._slots:
            self._transport.forget(slot.pinned.address, slot.size_bytes)
        self._slots = []

    @contextmanager
    def _whole(self, call: Call) -> Iterator[None]:
        """However this ends, nothing is on its way any more."""
        self.broken = True  # until it ended well
        try:
            yield
        except DeviceError as error:
            self._drain(call)
            call.fail(error)
        except BaseException:
            self._drain(call)
            raise
        else:
            self.broken = False

    def _follow(self, call: Call) -> None:
        """All slots come after what is on the caller's streams now."""
        for stream in call.follow:
            for slot in self._slots:
                slot.stream.follow(stream)

    def _drain(self, call: Call) -> None:
        for slot in self._slots:
            part, slot.part = slot.part, None
            if part is not None and part.pending is not None and part.batch is not None:
                part.pending.abandon()
                status = part.batch.status[part.run]
                # What was read has arrived in pinned memory only.
                call.status[part.at] = status if call.write else np.where(status == DONE, np.uint8(NOT_DONE), status)
        for slot in self._slots:
            try:
                slot.stream.wait()
            except DeviceError:
                pass  # what failed before; nothing runs any more

    # --- from the device ---

    def write(self, call: Call) -> None:
        """Gather, copy down, post; whatever slot is free gathers ahead of what is posted."""
        with self._whole(call):
            self._follow(call)
            cuts = parts.pack(call.pieces, self._part_bytes, self._most_pieces)
            gathered: deque[_Slot] = deque()
            begun = 0
            while True:
                while begun < len(cuts) and self._sent(call, slot := self._turn(begun), wait=False):
                    if call.late():
                        del cuts[begun:]
                        break
                    self._gather(call, slot, cuts[begun])
                    gathered.append(slot)
                    begun += 1
                if gathered:
                    self._send(call, gathered.popleft())
                elif begun < len(cuts):  # all are on the wire
                    self._sent(call, self._turn(begun), wait=True)
                else:
                    break
            for slot in self._slots:
                self._sent(call, slot, wait=True)

    def _turn(self, number: int) -> _Slot:
        return self._slots[number % len(self._slots)]

    def _gather(self, call: Call, slot: _Slot, at: slice) -> None:
        """Begin to bring a part to pinned memory."""
        part, layout = self._laid_out(call, at)
        pieces = call.pieces
        part.plan = make_plan(
            pieces.local[at],
            layout.position + np.uint64(slot.memory.address),
            pieces.length[at],
            pieces.group[at],
            pieces.start[at],
        )
        slot.part = part
        slot.stream.move(slot.up(part.plan), part.plan)
        slot.stream.copy(slot.pinned.address, slot.memory.address, layout.size_bytes)
        slot.down(part.plan)

    def _send(self, call: Call, slot: _Slot) -> None:
        """Post a part that was gathered."""
        part = slot.part
        assert part is not None and part.plan is not None and part.layout is not None
        slot.stream.wait()
        call.add(part.plan, slot.sums(part.plan))
        part.batch = slot.batch(part.layout)
        part.pending = call.post(part.batch)
        if part.pending is None:
            slot.part = None

    def _sent(self, call: Call, slot: _Slot, *, wait: bool) -> bool:
        """Whether the slot is free, because what was posted from it is terminal."""
        part = slot.part
        if part is None:
            return True
        if part.pending is None or not (wait or part.pending.poll()):
            return False
        self._settle(call, part)
        slot.part = None
        return True

    # --- to the device ---

    def read(self, call: Call) -> None:
        """Post, copy up, scatter; what has arrived is copied up before the next part is posted."""
        posted: deque[_Slot] = deque()
        with self._whole(call):
            self._follow(call)
            for number, at in enumerate(parts.pack(call.pieces, self._part_bytes, self._most_pieces)):
                slot = self._slots[number % len(self._slots)]
                while slot in posted:
                    self._scatter(call, posted.popleft())
                self._scattered(call, slot)
                if call.late():
                    break
                part, layout = self._laid_out(call, at)
                slot.part = part
                part.batch = slot.batch(layout)
                part.pending = call.post(part.batch)
                if part.pending is None:
                    slot.part = None
                    continue
                posted.append(slot)
                while posted and self._arrived(posted[0]):
                    self._scatter(call, posted.popleft())
            while posted:
                self._scatter(call, posted.popleft())
            for slot in self._slots:
                self._scattered(call, slot)

    def _arrived(self, slot: _Slot) -> bool:
        assert slot.part is not None and slot.part.pending is not None
        return slot.part.pending.poll()

    def _scatter(self, call: Call, slot: _Slot) -> None:
        """Wait for a part, and begin to bring what arrived of it to where it belongs."""
        part = slot.part
        assert part is not None and part.layout is not None
        self._settle(call, part)
        arrived = np.nonzero(call.status[part.at] == DONE)[0]
        if not len(arrived):
            slot.part = None
            return
        at = part.at.start + arrived
        pieces, status = call.pieces, call.status
        group = pieces.group[at]
        if len(arrived) < part.at.stop - part.at.start and (group >= 0).any():
            # A group that has not arrived whole gets no digest, so it isn't hashed: the rest could begin anywhere.
            lost = np.unique(pieces.group[part.at][status[part.at] != DONE])
            group = np.where(np.isin(group, lost), np.int32(-1), group)
        part.plan = make_plan(
            part.layout.position[arrived] + np.uint64(slot.memory.address),
            pieces.local[at],
            pieces.length[at],
            group,
            pieces.start[at],
        )
        status[at] = PEER_LOST  # until it is where it belongs
        slot.stream.copy(slot.memory.address, slot.pinned.address, part.layout.size_bytes)
        slot.stream.move(slot.up(part.plan), part.plan)
        slot.down(part.plan)
        part.pending, part.arrived = None, at

    def _scattered(self, call: Call, slot: _Slot) -> None:
        """Wait until a slot is free."""
        part = slot.part
        if part is None:
            return
        assert part.plan is not None
        slot.stream.wait()
        call.add(part.plan, slot.sums(part.plan))
        call.status[part.arrived] = DONE
        slot.part = None

    # --- both ---

    def _laid_out(self, call: Call, at: slice) -> tuple[_Part, Layout]:
        call.parts_count += 1
        pieces = call.pieces
        layout = parts.lay_out(pieces.region[at], pieces.offset[at], pieces.length[at])
        return _Part(at, layout.run, layout), layout

    def _settle(self, call: Call, part: _Part) -> None:
        """Bring a posted part to its end, and note what became of its pieces."""
        assert part.pending is not None and part.batch is not None
        part.pending.wait()
        call.status[part.at] = part.batch.status[part.run]
        if part.batch.error is not None:
            call.fail(part.batch.error)

    # --- without staging ---

    def direct(self, call: Call) -> None:
        """Let the transport move the memory itself; the device hashes it before a write and after a read."""
        slot, batch = self._slots[0], call.batch
        with self._whole(call):
            self._follow(call)
            slot.stream.wait()  # for whom the caller asked to be followed
            if call.write:
                self._hash(call, slot)
            if call.late():
                return
            whole = slice(0, len(call.pieces))
            columns = Batch(batch.local, batch.region, batch.offset, batch.length, kind=KIND)
            part = slot.part = _Part(whole, call.pieces.operation)
            part.batch = columns
            call.parts_count += 1
            with self._device.active():
                part.pending = call.post(columns)
                if part.pending is not None:
                    self._settle(call, part)
            slot.part = None
            if not call.write:
                self._hash(call, slot)

    def _hash(self, call: Call, slot: _Slot) -> None:
        pieces = call.pieces
        for at in parts.pack(pieces, 1 << 62, self._most_pieces):
            group = pieces.group[at]
            if not (group >= 0).any():
                continue
            nowhere = np.zeros(len(group), np.uint64)
            plan = make_plan(pieces.local[at], nowhere, pieces.length[at], group, pieces.start[at])
            slot.stream.move(slot.up(plan), plan)
            slot.down(plan)
            slot.stream.wait()
            call.add(plan, slot.sums(plan))
