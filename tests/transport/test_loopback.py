"""The loopback transport: the same history for the same seed, what each fault does, and that outcomes never lie."""

from __future__ import annotations

import gc
import time
from dataclasses import replace

import numpy as np
import pytest

import transport
from tests.transport.conftest import i32, one, random_bytes, u64
from transport.base import DENIED, DONE, NOT_DONE, PEER_LOST, TIMED_OUT, Batch, Region, UInt8Column
from transport.errors import (
    DescriptorError,
    PeerLostError,
    TimedOutError,
    TransportError,
    UnreachableError,
    UnsupportedError,
)
from transport.loopback import (
    PROFILES,
    Chance,
    Death,
    Delay,
    Drop,
    Fabric,
    Fault,
    LoopbackTransport,
    Partition,
    Profile,
    Reorder,
    Restart,
    Stall,
    Tear,
    schedule,
)

MS = 1_000_000
SIZE = 4096
UNFENCED = replace(PROFILES["verbs"], label="unfenced", fences=frozenset(), detects=frozenset())


class World:
    """One owner with one region, one client, connected."""

    def __init__(self, *faults: Fault, profile: str | Profile = "verbs", seed: int = 1, trace: bool = False) -> None:
        self.fabric = Fabric(seed, faults=faults, trace=trace)
        self.owner = LoopbackTransport(self.fabric, "owner", profile)
        self.region = self.owner.create_region("r", 1, SIZE)
        self.client, self.handle = self.join("client")

    def join(self, host: str) -> tuple[LoopbackTransport, int]:
        client = LoopbackTransport(self.fabric, host, self.owner.profile)
        handle = client.connect(
            self.region.descriptor,
            writable=True,
            exchange=lambda hello, _deadline_ns: self.owner.accept(hello, client.identity),
        )
        return client, handle

    def after(self, ns: int) -> int:
        return self.fabric.now_ns() + ns

    def filled(self, value: int, length: int = SIZE) -> tuple[UInt8Column, Batch]:
        """Local memory of one value, and a batch of it."""
        memory = np.full(length, value, np.uint8)
        self._kept = memory
        return memory, one(memory, self.handle)


def rows(memory: UInt8Column, handle: int, count: int) -> Batch:
    """Memory and as much of the region in equal parts."""
    size = memory.size // count
    at = np.arange(count, dtype=np.uint64) * np.uint64(size)
    return Batch(
        at + np.uint64(memory.ctypes.data), np.full(count, handle, np.int32), at, np.full(count, size, np.uint64)
    )


# --- determinism ---


def story(seed: int, profile: str) -> tuple[str, list[str]]:
    """A busy half second: two clients, all faults."""
    hosts = ["owner", "client", "other"]
    world = World(
        Delay(most_ns=50_000, probability=0.5),
        Reorder(most_ns=90_000, probability=0.2),
        Tear(probability=0.4, most_ns=30_000),
        Drop(probability=0.01),
        Drop(probability=0.01, what="answer"),
        *schedule(seed, hosts, 20 * MS, Chance(stall_ns=4 * MS, partition_ns=6 * MS, lasts_ns=MS)),
        profile=profile,
        seed=seed,
        trace=True,
    )
    other, theirs = world.join("other")
    clients = [(world.client, world.handle), (other, theirs)]
    memory = random_bytes(SIZE, seed)
    for turn in range(60):
        client, handle = clients[turn % 2]
        batch = rows(memory, handle, 16)
        (client.write if turn % 3 else client.read)(batch, world.after(400_000), turn % 2)
        if turn % 20 == 19 and "client" in client.capabilities.fences:
            world.owner.fence(client.identity)
    world.fabric.run_for(30 * MS)
    assert world.fabric.trace is not None
    return world.fabric.history(), world.fabric.trace


@pytest.mark.parametrize("profile", list(PROFILES))
def test_the_same_seed_gives_the_same_history(profile: str) -> None:
    first, trace = story(3, profile)
    assert story(3, profile) == (first, trace)
    assert len(trace) > 500
    assert story(4, profile)[0] != first


def test_schedules_come_from_the_seed() -> None:
    chance = Chance(stall_ns=MS, death_ns=5 * MS, partition_ns=3 * MS, memory=("gone", "kept"))
    first = schedule(1, ["a", "b"], 50 * MS, chance)
    assert first == schedule(1, ["a", "b"], 50 * MS, chance) != schedule(2, ["a", "b"], 50 * MS, chance)
    assert {type(each) for each in first} == {Stall, Death, Restart, Partition}


def test_time_stands_still_unless_moved() -> None:
    world = World()
    _, batch = world.filled(1)
    pending = world.client.post_write(batch)
    assert not pending.poll()
    assert world.fabric.now_ns() == 0
    assert not world.region.buffer.any()
    assert world.fabric.next_event_ns() == 1000
    assert pending.wait() == 1
    assert world.fabric.now_ns() == 2000, "there and back"
    assert not world.fabric.step(), "the deadline of a batch that has ended is no event"
    assert world.fabric.now_ns() == 2000


def test_own_events_share_the_queue() -> None:
    world = World()
    _, batch = world.filled(1)
    seen: list[bool] = []
    for at_ns in (999, 1001):
        world.fabric.call_at(at_ns, lambda: seen.append(bool(world.region.buffer.all())))
    assert world.client.write(batch) == 1
    assert seen == [False, True]


# --- faults of links ---


def test_delay_makes_operations_late() -> None:
    world = World(Delay(client="client", least_ns=5 * MS, most_ns=6 * MS))
    _, batch = world.filled(1)
    assert world.client.write(batch) == 1
    assert 10 * MS <= world.fabric.now_ns() <= 13 * MS
    world = World(Delay(client="another", most_ns=6 * MS, least_ns=5 * MS))
    assert world.client.write(world.filled(1)[1]) == 1
    assert world.fabric.now_ns() == 2000


def order_of_arrival(profile: str, threads: int) -> list[int]:
    world = World(Reorder(most_ns=50_000, probability=0.5), Delay(most_ns=20_000), profile=profile, trace=True)
    memory = random_bytes(SIZE)
    assert world.client.write(rows(memory, world.handle, 32), threads=threads) == 32
    assert world.fabric.trace is not None
    writes = [line.split() for line in world.fabric.trace if " write " in line]
    return [int(words[2].rpartition(".")[2]) for words in writes]


def test_reorder_where_no_order_is_promised() -> None:
    assert order_of_arrival("verbs", 1) == list(range(32))
    for profile, threads in (("verbs", 0), ("ucx-put", 1)):
        arrived = order_of_arrival(profile, threads)
        assert sorted(arrived) == list(range(32)) != arrived


def test_a_dropped_write_is_unknown_and_not_applied() -> None:
    world = World(Drop())
    _, batch = world.filled(1)
    assert world.client.write(batch, world.after(MS)) == 0
    assert batch.status.tolist() == [TIMED_OUT]
    assert isinstance(batch.error, TimedOutError)
    world.fabric.run_for(100 * MS)
    assert not world.region.buffer.any()
    world.fabric.calm()
    assert world.client.write(batch, world.after(MS)) == 1, "and the next batch works"


def test_a_dropped_answer_is_unknown_and_applied() -> None:
    world = World(Drop(what="answer"))
    _, batch = world.filled(1)
    assert world.client.write(batch, world.after(MS)) == 0
    assert batch.status.tolist() == [TIMED_OUT]
    assert world.region.buffer.all()


def test_nothing_overtakes_what_was_dropped_in_order() -> None:
    for seed in range(30):
        world = World(Drop(probability=0.1), seed=seed)
        memory = np.full(SIZE, 1, np.uint8)
        batch = rows(memory, world.handle, 16)
        done = world.client.write(batch, world.after(MS), 1)
        world.fabric.run_for(100 * MS)
        there = world.region.buffer.reshape(16, -1)[:, 0].tolist()
        assert there == [1] * done + [0] * (16 - done)
        world.fabric.calm()
        assert world.client.write(batch, world.after(MS), 1) == 16


def test_readers_see_torn_writes_and_reads_are_torn() -> None:
    """Mixtures of whole cache lines, old and new, and the new not always in front."""
    shapes = set()
    for torn in ("client", "other"):  # the writer's operation; the reader's
        for seed in range(40):
            world = World(Tear(client=torn, pieces=6, most_ns=50_000), seed=seed)
            reader, theirs = world.join("other")
            _, batch = world.filled(1, 512)
            into = np.zeros(512, np.uint8)
            read = reader.post_read(one(into, theirs), 0)
            if torn == "client":
                read.wait()
            else:
                world.fabric.run_for(20_000)
            write = world.client.post_write(batch)
            world.fabric.run_for(20_000)
            if torn == "client":
                read = reader.post_read(one(into, theirs), 0)
            assert read.wait() == write.wait() == 1
            lines = into.reshape(8, 64)
            assert (lines == lines[:, :1]).all(), "a cache line was torn"
            shapes.add((torn, tuple(lines[:, 0].tolist())))
            assert world.region.buffer[:512].all()
    for torn in ("client", "other"):
        mixed = [shape for which, shape in shapes if which == torn and len(set(shape)) == 2]
        assert any(list(shape) != sorted(shape, reverse=True) for shape in mixed)
        assert any(list(shape) != sorted(shape) for shape in mixed)


def test_lines_are_those_of_the_region() -> None:
    """An operation that begins inside a line is cut where the region's lines end."""
    for seed in range(40):
        world = World(Tear(pieces=8, most_ns=50_000), seed=seed, trace=True)
        memory = np.full(300, 1, np.uint8)
        assert world.client.write(one(memory, world.handle, 37)) == 1
        assert world.fabric.trace is not None
        for line in world.fabric.trace:
            if " write " in line:
                start, length = map(int, line.split()[3].partition("+")[2].split(":"))
                assert start == 37 or start % 64 == 0
                assert start + length == 337 or (start + length) % 64 == 0
        assert world.region.buffer[37:337].all()
        assert world.region.buffer.sum() == 300


# --- stalls, fences, late writes ---


def late_writer(profile: str | Profile) -> tuple[World, UInt8Column]:
    """A client that stalls with a write under way, beyond its deadline; and its memory, used for something else."""
    world = World(profile=profile)
    memory, batch = world.filled(7)
    pending = world.client.post_write(batch, world.after(MS))
    world.fabric.stall("client")
    world.fabric.run_for(10 * MS)
    assert pending.wait() == 0
    assert batch.status.tolist() == [TIMED_OUT]
    assert not world.region.buffer.any()
    memory[:] = 99
    return world, memory


@pytest.mark.parametrize("profile", ["verbs", "ucx-put", "ucx-message", "shm", UNFENCED], ids=str)
def test_a_late_write_lands_where_nobody_fences(profile: str | Profile) -> None:
    world, _ = late_writer(profile)
    world.fabric.wake("client")
    world.fabric.run_for(10 * MS)
    assert (world.region.buffer == 7).all(), "and with the bytes that were posted"


@pytest.mark.parametrize("profile", ["verbs", "ucx-put", "ucx-message"])
def test_a_late_write_does_not_land_after_the_fence(profile: str) -> None:
    world, _ = late_writer(profile)
    assert world.owner.fence(world.client.identity)
    world.fabric.wake("client")
    world.fabric.run_for(10 * MS)
    assert not world.region.buffer.any()
    _, batch = world.filled(8)
    assert world.client.write(batch, world.after(MS)) == 1, "it may connect again"


def test_a_fence_ends_a_torn_write_half_way() -> None:
    halves = 0
    for seed in range(30):
        world = World(Tear(pieces=6, most_ns=50_000), seed=seed)
        _, batch = world.filled(1)
        pending = world.client.post_write(batch)
        world.fabric.run_for(25_000)
        assert world.owner.fence(world.client.identity)
        before = world.region.buffer.copy()
        done = pending.wait()
        assert batch.status.tolist() == ([DONE] if done else [PEER_LOST])
        assert done or isinstance(batch.error, PeerLostError)
        world.fabric.run_for(10 * MS)
        assert (world.region.buffer == before).all()
        halves += 0 < np.count_nonzero(before) < SIZE
    assert halves


def test_no_fence_is_an_error() -> None:
    for profile in (UNFENCED, "shm"):
        with pytest.raises(UnsupportedError, match="fence"):
            World(profile=profile).owner.fence(bytes(16))


@pytest.mark.parametrize("profile", list(PROFILES))
def test_a_stalled_owner_matters_where_it_takes_part(profile: str) -> None:
    world = World(Stall(host="owner", at_ns=10, for_ns=5 * MS), profile=profile)
    world.fabric.run_for(20)
    _, batch = world.filled(3)
    done = world.client.write(batch, world.after(MS))
    assert done == int(world.client.capabilities.one_sided)
    assert bool(world.region.buffer.any()) == bool(done)
    world.fabric.run_for(10 * MS)
    assert world.region.buffer.all(), "it lands when the owner goes on"


# --- death, partition, restart ---


def test_death_is_noticed_where_it_can_be() -> None:
    for profile, status in (("verbs", PEER_LOST), (UNFENCED, TIMED_OUT)):
        world = World(Delay(least_ns=MS, most_ns=MS), Death(host="owner", at_ns=10), profile=profile)
        _, batch = world.filled(1)
        assert world.client.write(batch, world.after(50 * MS)) == 0
        assert batch.status.tolist() == [status]
        assert (world.fabric.now_ns() == 50 * MS) == (status == TIMED_OUT)
        assert not world.region.buffer.any()
        if status == PEER_LOST:
            assert world.client.write(batch, world.after(50 * MS)) == 0
            assert batch.status.tolist() == [NOT_DONE], "it knows by now"
            assert isinstance(batch.error, UnreachableError)
            assert world.fabric.now_ns() < 50 * MS
        with pytest.raises(TransportError, match="died"):
            world.owner.create_region("r", 2, SIZE)


def test_memory_that_is_kept_stays_in_reach() -> None:
    world = World(profile="shm")
    world.fabric.kill("owner", "kept")
    _, batch = world.filled(5)
    assert world.client.write(batch) == 1
    assert world.region.buffer.all()
    with pytest.raises(UnreachableError, match="ended"):
        world.client.connect(world.region.descriptor, writable=False)
    world.fabric.restart("owner")
    assert world.client.write(batch) == 1, "a new life is another owner; the old files stay mapped"


@pytest.mark.parametrize(("profile", "lands"), [("verbs", True), ("shm", False)])
def test_what_a_dead_client_sent(profile: str, lands: bool) -> None:
    world = World(profile=profile)
    _, batch = world.filled(1)
    pending = world.client.post_write(batch)
    world.fabric.kill("client")
    assert pending.wait() == 0
    world.fabric.run_for(MS)
    assert bool(world.region.buffer.all()) == lands
    with pytest.raises(TransportError, match="died"):
        world.client.write(batch)
    with pytest.raises(UnsupportedError, match="restart"):
        LoopbackTransport(world.fabric, "client")


def test_a_client_that_dies_while_stalled_sends_nothing() -> None:
    world, _ = late_writer("verbs")
    world.fabric.kill("client")
    world.fabric.run_for(MS)
    assert not world.region.buffer.any()


def test_an_old_life_is_never_reached() -> None:
    world = World(Restart(host="owner", at_ns=MS))
    world.fabric.run_for(2 * MS)
    owner = LoopbackTransport(world.fabric, "owner", "verbs")
    region = owner.create_region("r", 1, SIZE)
    _, batch = world.filled(1)
    for _ in range(3):
        assert world.client.write(batch, world.after(5 * MS)) == 0
    assert not region.buffer.any()
    with pytest.raises(DescriptorError, match="another life"):
        owner.accept(hello_for(world.region), world.client.identity)


def hello_for(region: Region) -> bytes:
    """What a client says first to the owner that a descriptor names."""
    from transport._loopback_messages import VERSION, Hello, decode_descriptor, encode

    return encode(Hello("loopback", VERSION, decode_descriptor(region.descriptor).owner))


def test_a_stall_does_not_outlast_a_life() -> None:
    world = World(Stall(host="client", at_ns=0, for_ns=5 * MS), Restart(host="client", at_ns=MS))
    world.fabric.run_until(2 * MS)
    client, handle = world.join("client")
    memory = np.full(SIZE, 1, np.uint8)
    assert client.write(one(memory, handle), world.after(MS)) == 1
    world.fabric.stall("client")
    world.fabric.run_for(10 * MS)
    assert world.fabric.host("client").stalled == 1, "the old life's wake is not the new one's"


@pytest.mark.parametrize(("profile", "status"), [("verbs", PEER_LOST), ("ucx-put", TIMED_OUT)])
def test_a_partition_loses_what_crosses_it(profile: str, status: int) -> None:
    world = World(Partition(one="client", other="owner", at_ns=0, for_ns=10 * MS), profile=profile)
    world.fabric.run_until(1)
    _, batch = world.filled(1)
    assert world.client.write(batch, world.after(3 * MS)) == 0
    assert batch.status.tolist() == [status]
    assert world.client.write(batch, world.after(2 * MS)) == 0
    assert batch.status.tolist() == [NOT_DONE], "no connection"
    with pytest.raises(UnreachableError, match="parted"):
        LoopbackTransport(world.fabric, "client", profile).connect(world.region.descriptor, writable=True)
    world.fabric.run_until(11 * MS)
    assert not world.region.buffer.any()
    assert world.client.write(batch, world.after(3 * MS)) == 1


def test_a_withdrawn_region_denies_and_others_go_on() -> None:
    world = World()
    other = world.owner.create_region("r", 2, SIZE)
    theirs = world.client.connect(other.descriptor, writable=True)
    memory = np.full(SIZE, 1, np.uint8)
    world.region.close()
    at = memory.ctypes.data
    batch = Batch(u64(at, at), i32(world.handle, theirs), u64(0, 0), u64(SIZE, SIZE))
    assert world.client.write(batch, world.after(MS), 1) == 1
    assert batch.status.tolist() == [DENIED, DONE]
    assert other.buffer.all()
    assert not world.region.buffer.any()


def test_a_region_withdrawn_under_a_torn_write_is_no_denial() -> None:
    found = set()
    for seed in range(30):
        world = World(Tear(pieces=6, most_ns=50_000), seed=seed)
        _, batch = world.filled(1)
        pending = world.client.post_write(batch)
        world.fabric.run_for(25_000)
        world.region.close()
        before = world.region.buffer.copy()
        pending.wait()
        world.fabric.run_for(MS)
        assert (world.region.buffer == before).all(), "a byte changed after the region was withdrawn"
        part = "all" if before.all() else "some" if before.any() else "none"
        assert int(batch.status[0]) == {"all": DONE, "some": PEER_LOST, "none": DENIED}[part]
        found.add(part)
    assert "some" in found


@pytest.mark.parametrize("write", [True, False])
def test_digests_of_groups_that_were_not_finished_are_zero(write: bool) -> None:
    for seed in range(10):
        world = World(Drop(probability=0.2), profile="ucx-put", seed=seed)
        memory = random_bytes(SIZE)
        world.region.buffer[:] = memory
        batch = rows(memory, world.handle, 16)
        batch.group = np.arange(16, dtype=np.int32) // 2
        batch.digest = np.zeros(8, np.uint64)
        (world.client.write if write else world.client.read)(batch, world.after(MS))
        for group in range(8):
            whole = not batch.status[2 * group : 2 * group + 2].any()
            part = memory[group * SIZE // 8 : (group + 1) * SIZE // 8]
            assert int(batch.digest[group]) == (transport.digest(part) if whole else 0)


# --- memory and limits ---


def test_local_memory_is_left_alone_after_the_end() -> None:
    world = World(Delay(least_ns=MS, most_ns=2 * MS))
    world.region.buffer[:] = 5
    for end in ("abandon", "deadline"):
        into = np.zeros(SIZE, np.uint8)
        batch = rows(into, world.handle, 16)
        pending = world.client.post_read(batch, world.after(MS + MS // 2))
        if end == "abandon":
            world.fabric.run_for(MS + MS // 4)
            assert pending.abandon() == pending.abandon() == 0
        else:
            assert pending.wait() < 16
        into[:] = 9
        world.fabric.run_for(10 * MS)
        assert (into == 9).all()


def test_a_batch_that_nobody_waits_for_is_given_up() -> None:
    world = World()
    world.region.buffer[:] = 5
    into = np.zeros(SIZE, np.uint8)
    pending = world.client.post_read(one(into, world.handle))
    del pending
    gc.collect()
    world.fabric.run_for(MS)
    assert not into.any()
    assert world.client.flush()


def test_several_owners_in_a_batch_of_which_one_is_gone() -> None:
    world = World()
    second = LoopbackTransport(world.fabric, "second", "verbs")
    region = second.create_region("r", 1, SIZE)
    client = world.client
    theirs = client.connect(
        region.descriptor, writable=True, exchange=lambda hello, _deadline_ns: second.accept(hello, client.identity)
    )
    world.fabric.kill("owner")
    at = np.full(SIZE, 1, np.uint8)
    batch = Batch(
        u64(*[at.ctypes.data] * 4), i32(world.handle, theirs, world.handle, theirs), u64(0, 0, 8, 8), u64(*[8] * 4)
    )
    assert client.write(batch, world.after(50 * MS)) == 2
    assert batch.status.tolist() == [PEER_LOST, DONE, PEER_LOST, DONE]
    assert region.buffer[:16].all()


def test_offsets_beyond_4_gib() -> None:
    """In memory that is never touched but where it is used."""
    world = World()
    size = (4 << 30) + (1 << 20)
    region = world.owner.register(np.zeros(size, np.uint8), 2)
    handle = world.client.connect(region.descriptor, writable=True)
    data = random_bytes(5000)
    offsets = [(1 << 31) - 5, (1 << 32) - 7, size - 5000]
    for offset in offsets:
        assert world.client.write(one(data, handle, offset)) == 1
        back = np.zeros_like(data)
        assert world.client.read(one(back, handle, offset)) == 1
        assert (back == data).all()
        assert (region.buffer[offset : offset + 5000] == data).all()


def test_disconnecting_waits_for_batches() -> None:
    world = World(Delay(least_ns=MS, most_ns=MS))
    _, batch = world.filled(1)
    pending = world.client.post_write(batch)
    world.client.disconnect(world.handle)
    assert pending.poll()
    assert pending.wait() == 1
    assert not world.owner.fence(world.client.identity), "it is not connected any more"


def test_ended_batches_leave_nothing_in_the_queue() -> None:
    world = World()
    _, batch = world.filled(1, 64)
    for _ in range(5000):
        assert world.client.write(batch) == 1
    assert len(world.fabric._queue) < 3000


def test_by_name_it_has_a_fabric_of_its_own() -> None:
    with transport.create("loopback", profile="ucx-put") as both:
        region = both.create_region("r", 1, SIZE)
        handle = both.connect(region.descriptor, writable=True)
        data = random_bytes(SIZE)
        deadline_ns = time.monotonic_ns() + 10_000 * MS
        assert both.write(one(data, handle), deadline_ns) == 1
        assert (region.buffer == data).all()
        assert both.write(one(data, handle), time.monotonic_ns() - 1) == 0
        with transport.create("loopback", profile="ucx-put") as other, pytest.raises(UnreachableError, match="fabric"):
            other.connect(region.descriptor, writable=True)
    with pytest.raises(ValueError, match="profile"):
        transport.create("loopback", profile="carrier pigeon")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Delay(most_ns=1, least_ns=2),
        lambda: Drop(probability=1.5),
        lambda: Drop(what="both"),  # type: ignore[arg-type]
        lambda: Tear(pieces=1),
        lambda: Death(host="a", at_ns=0, memory="lost"),  # type: ignore[arg-type]
        lambda: Profile("x", fences=frozenset({"garden"})),
        lambda: Profile("x", detects=frozenset({"lies"})),
        lambda: Reorder(most_ns=-1),
        lambda: Delay(most_ns=1, from_ns=2, until_ns=1),
    ],
)
def test_impossible_faults_are_refused(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]
