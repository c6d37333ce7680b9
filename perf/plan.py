"""What is measured, and within which memory and time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memfabric.perf import machine

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK_BYTES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 2 * MIB)
BATCHES = (1, 16, 128, 512)
PAYLOAD_BYTES = GIB
"""Largest batch, in bytes; twice that and a half is the memory of a full run."""
WORKING_SET_BYTES = 64 * MIB
"""Batches are taken in turn from at least this much, so that blocks come from memory and not from a cache."""
MOST_SETS = 2048
LANES = 6
"""Actions that take turns in `copies`."""


@dataclass(frozen=True)
class Plan:
    """Sizes and times of a run.

    Attributes:
        block_bytes, batches: the grid.
        payload_bytes: larger batches are skipped.
        working_set_bytes: see `WORKING_SET_BYTES`.
        combination_s: how long each combination is repeated.
        reader_shapes: (block_bytes, batch) of the comparison of one and two readers; reader_s: of each phase.
        latency_count: samples of single gets.
        table_blocks: blocks in the metadata table while it is measured.
        core_repeats, wire_repeats: requests of each kind and size.
        idle_s: how long the nodes are watched while nobody reads.
        directory: where regions are kept.
    """

    block_bytes: tuple[int, ...]
    batches: tuple[int, ...]
    payload_bytes: int
    working_set_bytes: int
    combination_s: float
    reader_shapes: tuple[tuple[int, int], ...]
    reader_s: float
    latency_count: int
    table_blocks: int
    core_repeats: int
    wire_repeats: int
    idle_s: float
    directory: Path

    @property
    def pool_bytes(self) -> int:
        """Memory of the pool: the largest batch, its headers, and regions that are not quite filled."""
        return max(self.payload_bytes, self.working_set_bytes) * 3 // 2 + 32 * MIB

    def combinations(self) -> Iterator[tuple[int, int]]:
        """(block_bytes, batch) that fit."""
        for block_bytes in self.block_bytes:
            for batch in self.batches:
                if block_bytes * batch <= self.payload_bytes:
                    yield block_bytes, batch

    def skipped(self) -> list[str]:
        """What does not fit, in words."""
        return [
            f"{size_text(block_bytes)} x {batch}: {size_text(block_bytes * batch)} is more than the "
            f"{size_text(self.payload_bytes)} that this run may use"
            for block_bytes in self.block_bytes
            for batch in self.batches
            if block_bytes * batch > self.payload_bytes
        ]

    def set_count(self, block_bytes: int, batch: int) -> int:
        """Batches that are taken in turn: enough to outgrow the caches, and where there is room one for each of the
        actions that are compared."""
        size = block_bytes * batch
        wanted = max(self.working_set_bytes // size, min(LANES, self.payload_bytes // size))
        return min(MOST_SETS, max(1, wanted))


def full(directory: Path) -> Plan:
    """What `make bench` runs, fitted to the memory there is."""
    room = min(machine.shared_memory_free_bytes(directory) // 2, machine.available_bytes() // 4)
    payload = PAYLOAD_BYTES
    while payload > max(room, 64 * MIB):
        payload //= 2
    return Plan(
        block_bytes=BLOCK_BYTES,
        batches=BATCHES,
        payload_bytes=payload,
        working_set_bytes=min(WORKING_SET_BYTES, payload),
        combination_s=3.0,
        reader_shapes=((64 * KIB, 16), (64 * KIB, 128), (2 * MIB, 16)),
        reader_s=0.4,
        latency_count=20_000,
        table_blocks=1_000_000,
        core_repeats=60,
        wire_repeats=60,
        idle_s=5.0,
        directory=directory,
    )


def quick(directory: Path) -> Plan:
    """The same in small, to see that everything runs; its figures mean little."""
    return Plan(
        block_bytes=(4 * KIB, 64 * KIB, MIB),
        batches=(1, 16),
        payload_bytes=16 * MIB,
        working_set_bytes=16 * MIB,
        combination_s=0.25,
        reader_shapes=((64 * KIB, 16),),
        reader_s=0.1,
        latency_count=1000,
        table_blocks=100_000,
        core_repeats=10,
        wire_repeats=10,
        idle_s=1.0,
        directory=directory,
    )


def size_text(count: int) -> str:
    """Bytes as people write them: 64 KiB, 1.5 GiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count / unit:g} {name}"
    return f"{count} B"
