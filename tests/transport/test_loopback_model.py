"""The loopback transport against a model of memory: which bytes may be where, given what is under way.

Each write has a value of its own, so every byte tells which write it came from. Held at every step:
- A byte of the region is one that some write put there which may have.
- A read that is `DONE` saw, byte by byte, what may have been there at some time while it was under way.
- A write that is `DONE` is there, unless another that may have come after it is; one that is not applied never is.
- After a fence, or an owner's death, nothing lands of what was posted before.
- Local memory does not change once a batch is terminal.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.transport.conftest import one
from transport.base import DONE, Batch, Outcome, Pending, UInt8Column, outcome
from transport.loopback import PROFILES, Delay, Drop, Fabric, Fault, LoopbackTransport, Reorder, Tear

LINES = 6
SIZE = LINES * 64
US = 1000
SENTINEL = 255
CLIENTS = ("a", "b")
SPANS = {
    "name": st.sampled_from(CLIENTS),
    "start": st.integers(0, SIZE - 1) | st.sampled_from([0, 64, 128]),
    "length": st.integers(1, SIZE) | st.just(SIZE),
    "deadline_us": st.integers(1, 300),
}


@dataclass(eq=False)
class Flying:
    """An operation, and what the model knows of it."""

    client: str
    span: slice
    memory: UInt8Column
    batch: Batch
    pending: Pending
    value: int | None
    """Of a write."""
    rivals: list[Flying] = field(default_factory=list)
    """Writes that might land while this one is under way."""
    seen: list[set[int]] = field(default_factory=list)
    """What a read may see, for each byte."""
    ended: bool = False

    def overlaps(self, other: Flying) -> bool:
        return self.span.start < other.span.stop and other.span.start < self.span.stop


class Memory(RuleBasedStateMachine):
    profile = "verbs"

    @initialize(seed=st.integers(0, 1 << 32), foul=st.booleans(), lossy=st.booleans())
    def begin(self, seed: int, foul: bool, lossy: bool) -> None:
        faults: list[Fault] = []
        if foul:
            faults += [
                Delay(most_ns=20 * US, probability=0.5),
                Reorder(most_ns=20 * US, probability=0.3),
                Tear(pieces=4, most_ns=20 * US, probability=0.7),
            ]
        if lossy:
            faults += [Drop(probability=0.1), Drop(probability=0.1, what="answer")]
        self.fabric = Fabric(seed, faults=faults)
        self.ordered = PROFILES[self.profile].ordered
        self.fenced = "client" in PROFILES[self.profile].fences
        self.clients = {name: LoopbackTransport(self.fabric, name, self.profile) for name in CLIENTS}
        self.flying: list[Flying] = []
        self.terminal: list[Flying] = []
        self.next_value = 0
        self.past: list[tuple[UInt8Column, UInt8Column]] = []
        self.own()

    def own(self) -> None:
        """A new life of the owner."""
        self.owner = LoopbackTransport(self.fabric, "owner", self.profile)
        self.region = self.owner.create_region("r", 1, SIZE)
        self.may: list[set[int]] = [{0} for _ in range(SIZE)]
        self.loose: list[Flying] = []
        self.handles: dict[str, int] = {}

    def handle(self, name: str) -> int | None:
        if name not in self.handles:
            client = self.clients[name]
            if self.fabric.host("owner").stalled or self.fabric.is_cut(name, "owner"):
                return None
            self.handles[name] = client.connect(
                self.region.descriptor,
                writable=True,
                exchange=lambda hello, _deadline_ns: self.owner.accept(hello, client.identity),
            )
        return self.handles[name]

    def post(self, name: str, start: int, length: int, deadline_us: int, value: int | None) -> None:
        handle = self.handle(name)
        if handle is None:
            return
        length = min(length, SIZE - start)
        span = slice(start, start + length)
        memory = np.full(length, SENTINEL if value is None else value, np.uint8)
        batch = one(memory, handle, start)
        deadline_ns = self.fabric.now_ns() + deadline_us * US
        client = self.clients[name]
        pending = (client.post_read if value is None else client.post_write)(batch, deadline_ns, 1)
        made = Flying(name, span, memory, batch, pending, value)
        if value is None:
            made.seen = [set(each) for each in self.may[span]]
        else:
            for each in self.may[span]:
                each.add(value)
            for other in self.loose:
                if other.overlaps(made):
                    made.rivals.append(other)
                    other.rivals.append(made)
            for other in self.flying:
                if other.value is None and other.overlaps(made):
                    for at in range(max(other.span.start, start), min(other.span.stop, span.stop)):
                        other.seen[at - other.span.start].add(value)
            self.loose.append(made)
        self.flying.append(made)

    @precondition(lambda self: self.next_value < SENTINEL - 1)
    @rule(**SPANS)
    def write(self, name: str, start: int, length: int, deadline_us: int) -> None:
        self.next_value += 1
        self.post(name, start, length, deadline_us, self.next_value)

    @rule(**SPANS)
    def read(self, name: str, start: int, length: int, deadline_us: int) -> None:
        self.post(name, start, length, deadline_us, None)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.fabric.step()
            self.look()

    @rule(us=st.integers(1, 60))
    def pass_time(self, us: int) -> None:
        self.fabric.run_for(us * US)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), abandon=st.booleans())
    def end(self, data: st.DataObject, abandon: bool) -> None:
        chosen = data.draw(st.sampled_from(self.flying))
        done = chosen.pending.abandon() if abandon else chosen.pending.wait()
        assert done == int(chosen.batch.status[0] == DONE)
        assert chosen.pending.poll()

    @rule(name=st.sampled_from(CLIENTS))
    def fence(self, name: str) -> None:
        if self.fenced and not self.fabric.host("owner").stalled:
            self.owner.fence(self.clients[name].identity)
            self.land_no_more([each for each in self.loose if each.client == name])

    def land_no_more(self, writes: list[Flying]) -> None:
        for write in writes:
            self.loose.remove(write)

    @rule(name=st.sampled_from([*CLIENTS, "owner"]))
    def stall(self, name: str) -> None:
        if not self.fabric.host(name).stalled:
            self.fabric.stall(name)

    @rule(name=st.sampled_from([*CLIENTS, "owner"]))
    def wake(self, name: str) -> None:
        self.fabric.wake(name)

    @rule(name=st.sampled_from(CLIENTS), heal=st.booleans())
    def part(self, name: str, heal: bool) -> None:
        if heal:
            self.fabric.heal(name, "owner")
        elif not self.fabric.is_cut(name, "owner"):
            self.fabric.cut(name, "owner")

    @rule()
    def restart_owner(self) -> None:
        self.look()
        self.fabric.restart("owner")
        self.past.append((self.region.buffer, self.region.buffer.copy()))
        for each in self.flying:  # what they did before is in the region that is past
            each.pending.abandon()
        self.look()
        self.own()

    def look(self) -> None:
        """Take in what has ended."""
        for each in list(self.flying):
            if each.pending.poll():
                self.flying.remove(each)
                each.ended = True
                self.terminal.append(each)
                if each.value is None:
                    self.read_ended(each)
                else:
                    self.write_ended(each, each.value)

    def read_ended(self, read: Flying) -> None:
        if int(read.batch.status[0]) == DONE:
            for at, (value, allowed) in enumerate(zip(read.memory.tolist(), read.seen, strict=True)):
                assert value in allowed, f"byte {read.span.start + at} was read as {value}, may be {allowed}"
        read.memory[:] = SENTINEL

    def write_ended(self, write: Flying, value: int) -> None:
        what = outcome(int(write.batch.status[0]))
        write.memory[:] = SENTINEL
        if what is Outcome.UNKNOWN:
            return
        if write in self.loose:
            self.loose.remove(write)
        if what is Outcome.NOT_APPLIED:
            for each in self.may[write.span]:
                each.discard(value)
            for other in write.rivals:
                other.rivals.remove(write)
            return
        for at in range(write.span.start, write.span.stop):
            later = {
                each.value
                for each in write.rivals
                if each.value is not None and each.span.start <= at < each.span.stop and not self.before(each, write)
            }
            self.may[at] = {value} | (later & self.may[at])

    def before(self, one: Flying, other: Flying) -> bool:
        """Whether one write was performed before another, both done, because they are in order."""
        done = one.ended and int(one.batch.status[0]) == DONE
        return self.ordered and done and one.client == other.client and (one.value or 0) < (other.value or 0)

    @invariant()
    def nothing_lies(self) -> None:
        self.look()
        for at, (value, may) in enumerate(zip(self.region.buffer.tolist(), self.may, strict=True)):
            assert value in may, f"byte {at} is {value}, may be {may}"
        for each in self.terminal:
            assert (each.memory == SENTINEL).all(), "local memory changed after the end"
        for memory, then in self.past:
            assert (memory == then).all(), "memory of an owner that is gone changed"

    def teardown(self) -> None:
        if not hasattr(self, "fabric"):
            return
        for name in [*CLIENTS, "owner"]:
            self.fabric.wake(name)
        self.fabric.calm()
        for each in list(self.flying):
            each.pending.wait()
        self.fabric.run_for(1000 * US)
        self.nothing_lies()
        for name in CLIENTS:  # and then all works again
            handle = self.handle(name)
            assert handle is not None
            for _ in range(2):  # the first may go by a connection that was lost, unnoticed
                memory = np.full(SIZE, SENTINEL - 1, np.uint8)
                done = self.clients[name].write(one(memory, handle), self.fabric.now_ns() + 10_000 * US)
            assert done == 1
            assert (self.region.buffer == SENTINEL - 1).all()


@pytest.mark.parametrize("profile", list(PROFILES))
def test_memory_is_as_the_model_allows(profile: str) -> None:
    machine = type("Of" + profile.title().replace("-", ""), (Memory,), {"profile": profile})
    machine.TestCase.settings = settings(
        max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine.TestCase().runTest()
