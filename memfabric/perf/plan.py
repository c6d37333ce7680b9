"""What a sweep measures, and within which memory and time.

A sweep is the product of its axes. Its points are visited in rounds: every round visits all points of one *setting*
(what runs in the meantime: a pool, or the owner of a region) in another order, so that a point's repeats lie apart in
time and what disturbs the machine for a while does not fall on one point alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memfabric import units
from memfabric.core.layout import MAX_BLOCK_BYTES
from memfabric.errors import UsageError
from memfabric.perf.axes import Fabric
from memfabric.perf.pool import REGIONS_PER_NODE
from memfabric.perf.stream import PART_BYTES
from memfabric.units import KIB, MIB
from transport import registry, tightest_room

RAW = ("read", "write")
"""Between a client and a region, by batches of a transport."""
POOL = ("get", "put", "match", "reserve+commit")
"""By a client of a pool."""
OPS = (*RAW, *POOL)
REQUESTS = ("match", "reserve+commit")
"""These move no payload; block sizes make no difference to them."""
KINDS = ("cpu", "cuda")
MOST_BATCH = 1 << 16
MOST_DEPTH, MOST_THREADS, MOST_CLIENTS, MOST_NODES, MOST_REPEATS = 256, 64, 64, 16, 100
MOST_POINTS = 5000
LEAST_POINT_S = 0.02
MOST_SETS = 2048
REQUEST_SETS = 16
POOL_HEADROOM = 2
"""Memory of a pool over that of the working sets: regions that are not quite filled, one for each of several nodes."""
SPLIT_RATIO = {"op": 0.6, "memcpy": 0.2, "socket": 0.2}
"""How a visit's time is shared between what is measured and the limits beside it."""
IDLE_S = 0.4
"""How long nodes are watched while nobody asks anything of them, so that what they use anyhow can be taken off."""
_START_S = {"raw": 2.5, "pool": 4.5}
_VISIT_S = 0.18
_FILL_BYTES_PER_S = 1.5e9
"""Of getting a working set ready and checked; a guess that the estimate rests on."""


@dataclass(frozen=True)
class Point:
    """One combination.

    Attributes:
        op: one of `OPS`.
        transport: label of its `Fabric`.
        kind: of the client's memory: ``cpu`` or ``cuda``.
        block_bytes: of one block.
        batch: blocks in one operation. depth: operations in flight at once.
        threads: native threads of one operation; 0: as many as pay.
        clients: processes that do the same at the same time.
        nodes: memory nodes of the pool; 0 for `RAW`, and for a pool that was there before.
    """

    op: str
    transport: str
    kind: str
    block_bytes: int
    batch: int
    depth: int
    threads: int
    clients: int
    nodes: int

    @property
    def batch_bytes(self) -> int:
        """Payload of one operation."""
        return self.block_bytes * self.batch

    def __str__(self) -> str:
        size = "" if self.op in REQUESTS else f"{units.format_bytes(self.block_bytes)} "
        words = [f"{self.op} {size}x {self.batch} over {self.transport}"]
        words += [f"depth {self.depth}"] if self.depth > 1 else []
        words += [f"threads {self.threads}"] if self.threads else []
        words += [f"clients {self.clients}"] if self.clients > 1 else []
        words += [f"nodes {self.nodes}"] if self.nodes else []
        words += [self.kind] if self.kind != "cpu" else []
        return ", ".join(words)


@dataclass(frozen=True)
class Setting:
    """What runs while some points are measured: an owner of regions, or a pool."""

    raw: bool
    transport: str
    kind: str
    nodes: int


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Axes and limits of a sweep; see `Point` for the axes.

    Attributes:
        verify: make and check digests: True, False, or None: in pools, where that is the default, but not for `RAW`.
        repeats: visits of each point.
        point_s: time for each point, all repeats and limits together, without what it takes to get ready.
        total_s: at most for everything; None: as long as it takes.
        working_set_bytes: blocks are taken in turn from at least this much for each client, so that they come from
            memory and not from a cache.
        memory_bytes: most that buffers and regions may take together; None: half of what is free.
        seed: for keys, bytes, and the order of things.
        random_order: whether raw batches take the region's blocks in random order.
        address: of a pool that is there; None: one is started for the sweep.
        directory: shared memory for regions.
    """

    ops: tuple[str, ...] = ("read", "write")
    fabrics: tuple[Fabric, ...] = (Fabric("shm", "shm"),)
    kinds: tuple[str, ...] = ("cpu",)
    block_bytes: tuple[int, ...] = (4 * KIB, 64 * KIB, MIB)
    batches: tuple[int, ...] = (1, 16, 128)
    depths: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (0,)
    clients: tuple[int, ...] = (1,)
    nodes: tuple[int, ...] = (1,)
    verify: bool | None = None
    repeats: int = 5
    point_s: float = 1.0
    total_s: float | None = None
    working_set_bytes: int = 64 * MIB
    memory_bytes: int | None = None
    seed: int = 1
    random_order: bool = False
    address: str | None = None
    directory: Path = Path("/dev/shm")

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            UsageError: says which value and why.
        """
        _known("operation", self.ops, OPS)
        _known("memory kind", self.kinds, KINDS)
        names = ["auto", *registry.names()]
        _known("transport", [each.name for each in self.fabrics], names)
        _between("block size", self.block_bytes, 1, MAX_BLOCK_BYTES)
        _between("batch", self.batches, 1, MOST_BATCH)
        _between("depth", self.depths, 1, MOST_DEPTH)
        _between("threads", self.threads, 0, MOST_THREADS)
        _between("clients", self.clients, 1, MOST_CLIENTS)
        _between("nodes", self.nodes, 1, MOST_NODES)
        _between("repeats", [self.repeats], 1, MOST_REPEATS)
        if not LEAST_POINT_S <= self.point_s < 1e6:
            raise UsageError(f"a point takes at least {LEAST_POINT_S:g} s, not {self.point_s:g} s")
        if self.total_s is not None and not 0 < self.total_s < 1e9:
            raise UsageError(f"the whole budget must be above 0, not {self.total_s:g} s")
        if self.working_set_bytes < 4 * KIB:
            raise UsageError(f"the working set must be 4 KiB or more, not {self.working_set_bytes} bytes")
        if self.address is not None and not set(self.ops) & set(POOL):
            raise UsageError(f"{' and '.join(self.ops)} use no pool, so there is nothing to do at {self.address}")
        if any(each.name == "auto" for each in self.fabrics) and set(self.ops) & set(RAW):
            raise UsageError("read and write need a transport by name; auto is for pools")
        if len({each.label for each in self.fabrics}) != len(self.fabrics):
            raise UsageError("a transport is named twice")
        if not self.directory.is_dir():
            raise UsageError(f"{self.directory} is not a directory; regions need one in shared memory")
        most = len(self.ops) * len(self.fabrics) * len(self.kinds) * len(self.block_bytes) * len(self.batches)
        most *= len(self.depths) * len(self.threads) * len(self.clients) * len(self.nodes)
        if most > MOST_POINTS:
            raise UsageError(f"the axes make up to {most} points, over the limit of {MOST_POINTS}; take larger steps")

    def fabric(self, label: str) -> Fabric:
        """The transport behind a point's label."""
        return next(each for each in self.fabrics if each.label == label)

    def verified(self, point: Point) -> bool:
        """Whether digests are made and checked."""
        return point.op in POOL if self.verify is None else self.verify

    def document(self) -> dict[str, Any]:
        """For JSON."""
        found = dataclasses.asdict(self)
        found["fabrics"] = [
            {"label": each.label, "name": each.name, "options": each.arguments()} for each in self.fabrics
        ]
        return {**found, "directory": str(self.directory)}


@dataclass(frozen=True)
class Plan:
    """A sweep that fits: its points, and why others are left out.

    Attributes:
        points: by what runs in the meantime, in the order of the axes.
        skipped: points that take too much memory, with the reason.
        point_s: time for each point; less than the sweep's where its whole budget demands it.
        estimate_s: how long everything will take, about.
        memory_bytes: most that buffers and regions will take.
    """

    sweep: Sweep
    points: dict[Setting, list[Point]]
    skipped: list[tuple[Point, str]]
    point_s: float
    estimate_s: float
    memory_bytes: int

    def count(self) -> int:
        """Points in all."""
        return sum(len(points) for points in self.points.values())


def make_plan(sweep: Sweep) -> Plan:
    """Check a sweep and fit it into memory and time.

    Raises:
        UsageError: a value is impossible, nothing fits into the memory, or the budget is too short for the points.
    """
    sweep.check()
    room = tightest_room(sweep.directory)
    allowed = room.free_bytes // 2 if sweep.memory_bytes is None else sweep.memory_bytes
    if allowed > room.free_bytes:
        raise UsageError(
            f"{units.format_bytes(allowed)} of memory were allowed, but {room.source} has only "
            f"{units.format_bytes(room.free_bytes)}; {room.advice}"
        )
    settings: dict[Setting, list[Point]] = {}
    skipped: list[tuple[Point, str]] = []
    needed = 0
    for point in dict.fromkeys(_points(sweep)):
        needs = memory_needed(sweep, point)
        if needs > allowed:
            reason = f"it would take {units.format_bytes(needs)} of memory; {units.format_bytes(allowed)} are allowed"
            skipped.append((point, reason))
        else:
            needed = max(needed, needs)
            settings.setdefault(setting_of(sweep, point), []).append(point)
    if not settings:
        point, reason = skipped[0]
        raise UsageError(
            f"no point fits into the memory. {point}: {reason}; take smaller blocks or batches, fewer clients, or "
            "allow more with --memory"
        )
    every = [point for points in settings.values() for point in points]
    rest_s = sum(_START_S["raw" if each.raw else "pool"] for each in settings)
    rest_s += sum(
        sweep.repeats * (_VISIT_S + set_bytes(sweep, point) * point.clients / _FILL_BYTES_PER_S) for point in every
    )
    point_s = sweep.point_s
    if sweep.total_s is not None and rest_s + point_s * len(every) > sweep.total_s:
        point_s = (sweep.total_s - rest_s) / len(every)
        if point_s < LEAST_POINT_S:
            raise UsageError(
                f"{len(every)} points do not fit into {sweep.total_s:g} s: getting ready alone takes about "
                f"{rest_s:.0f} s. Take fewer points or repeats, or at least "
                f"{rest_s + LEAST_POINT_S * len(every) + 1:.0f} s"
            )
    return Plan(sweep, settings, skipped, point_s, rest_s + point_s * len(every), needed)


def setting_of(sweep: Sweep, point: Point) -> Setting:
    """What must run for a point."""
    return Setting(point.op in RAW, point.transport, point.kind, point.nodes)


def set_count(sweep: Sweep, point: Point) -> int:
    """Batches that a client takes in turn."""
    most = REQUEST_SETS if point.op in REQUESTS else MOST_SETS
    wanted = min(most, max(1, sweep.working_set_bytes // point.batch_bytes))
    return max(wanted, point.depth)


def set_bytes(sweep: Sweep, point: Point) -> int:
    """One client's working set."""
    return set_count(sweep, point) * point.batch_bytes


def lent_bytes(sweep: Sweep, point: Point) -> int:
    """Memory that the owner of the region, or all nodes of the sweep's own pool, must lend for a point."""
    wanted = set_bytes(sweep, point) * point.clients
    if point.op in RAW:
        return wanted
    if sweep.address is not None:
        return 0
    return max(POOL_HEADROOM * wanted, point.nodes * REGIONS_PER_NODE * (2 * point.block_bytes + MIB))


def memory_needed(sweep: Sweep, point: Point) -> int:
    """All buffers and regions of a point: each client's own memory, another as large to copy to, both ends of a socket,
    and what is lent."""
    socket_bytes = 2 * min(PART_BYTES, max(MIB, point.batch_bytes))
    return point.clients * (2 * set_bytes(sweep, point) + socket_bytes) + lent_bytes(sweep, point)


def _points(sweep: Sweep) -> Iterator[Point]:
    for op, fabric, kind in itertools.product(sweep.ops, sweep.fabrics, sweep.kinds):
        block_sizes: Sequence[int] = (min(sweep.block_bytes),) if op in REQUESTS else sweep.block_bytes
        nodes: Sequence[int] = (0,) if op in RAW or sweep.address is not None else sweep.nodes
        depths: Sequence[int] = sweep.depths if op in RAW else (1,)
        if op in REQUESTS and kind != "cpu":
            continue
        for clients, count in itertools.product(sweep.clients, nodes):
            for size, batch, depth, threads in itertools.product(block_sizes, sweep.batches, depths, sweep.threads):
                yield Point(op, fabric.label, kind, size, batch, depth, threads, clients, count)


def _known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise UsageError(f"no {what} {name!r}; there are: {', '.join(known)}")
    if not given:
        raise UsageError(f"no {what} is given")


def _between(what: str, given: Sequence[int], least: int, most: int) -> None:
    for value in given:
        if not least <= value <= most:
            raise UsageError(f"{what} must be {least} to {most}, not {value}")
    if not given:
        raise UsageError(f"no {what} is given")
