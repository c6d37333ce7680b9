"""Nodes and regions: who lends memory, to whom it is assigned, which blocks of it are free.

Pure. Responsible for membership and the free lists; it does not decide about leases or eviction. A region belongs to
at most one namespace at a time, and is ACTIVE only after its node said that it has formatted it.
"""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
import numpy.typing as npt

from memfabric.core.layout import LayoutError, RegionLayout, plan_region
from memfabric.core.messages import NodeState, NodeView, RegionOffer, RegionView, View
from memfabric.core.namespaces import Namespace
from memfabric.core.table import BlockTable, Slots


class RegionState(enum.Enum):
    """Life of a region at the server."""

    UNASSIGNED = "unassigned"
    ASSIGNING = "assigning"
    ACTIVE = "active"
    VACATING = "vacating"
    """Wanted by another namespace: no new blocks; returned when the last block is free."""
    RETURNING = "returning"
    FAILED = "failed"
    """Its node could not format it; it is left alone."""


@dataclasses.dataclass
class Region:
    """A region as the server sees it.

    `free` holds the indices of free blocks in ``free[:free_count]``; the lowest are taken first while the region is
    fresh, so that a chain lands in neighbouring blocks.
    """

    number: int
    offer: RegionOffer
    node: str
    state: RegionState = RegionState.UNASSIGNED
    namespace: int | None = None
    last_namespace: int | None = None
    layout: RegionLayout | None = None
    base: int = 0
    free: npt.NDArray[np.int32] = dataclasses.field(default_factory=lambda: np.empty(0, np.int32))
    free_count: int = 0

    @property
    def block_count(self) -> int:
        """Blocks of an assigned region; 0 of another."""
        return self.layout.block_count if self.layout else 0

    def take(self, count: int) -> Slots:
        """Slots of `count` free blocks, ascending."""
        assert count <= self.free_count
        taken = self.free[self.free_count - count : self.free_count]
        self.free_count -= count
        slots: Slots = np.sort(taken) + np.int32(self.base)
        return slots

    def give(self, slots: Slots) -> None:
        """Return blocks."""
        end = self.free_count + len(slots)
        assert end <= self.block_count
        self.free[self.free_count : end] = slots - np.int32(self.base)
        self.free_count = end


@dataclasses.dataclass
class Node:
    """A node as the server sees it. `peer` is the connection that commands go to."""

    name: str
    incarnation: int
    host: str
    peer: bytes
    state: NodeState
    last_seen_ns: int
    joined_ns: int
    regions: list[int] = dataclasses.field(default_factory=list)
    transports: tuple[str, ...] = ()


def misfit(region: Region, namespace: Namespace) -> str:
    """Why a region cannot be cut into the namespace's blocks; empty when it can."""
    try:
        plan_region(region.offer.size_bytes, namespace.spec.block_bytes, namespace.spec.segments)
    except LayoutError as error:
        return str(error)
    return ""


class Cluster:
    """All nodes and regions."""

    def __init__(self, table: BlockTable) -> None:
        self.table = table
        self.nodes: dict[str, Node] = {}
        self.regions: dict[int, Region] = {}
        self.base_of: npt.NDArray[np.int64] = np.zeros(1, np.int64)
        self._next_number = 1

    def add_node(self, node: Node, offers: list[RegionOffer]) -> None:
        """A node joined with its regions, all unassigned."""
        self.nodes[node.name] = node
        for offer in offers:
            number = self._next_number
            self._next_number += 1
            self.regions[number] = Region(number, offer, node.name)
            node.regions.append(number)
        self.base_of = np.concatenate([self.base_of, np.zeros(max(0, self._next_number - len(self.base_of)), np.int64)])

    def remove_regions(self, node: Node) -> list[Region]:
        """Take all regions of a node out of the books; their slots must have been freed."""
        gone = [self.regions.pop(number) for number in node.regions]
        node.regions.clear()
        for region in gone:
            if region.layout is not None:
                self.table.drop_range(region.base, region.block_count)
        return gone

    def unassigned(self) -> list[Region]:
        """Regions that can be assigned now: of active nodes, those whose node has assigned the fewest first."""
        out = [
            region
            for region in self.regions.values()
            if region.state is RegionState.UNASSIGNED and self.nodes[region.node].state is NodeState.ACTIVE
        ]
        assigned = {
            name: sum(self.regions[number].namespace is not None for number in node.regions)
            for name, node in self.nodes.items()
        }
        return sorted(out, key=lambda region: (assigned[region.node], region.number))

    def assignable(self, namespace: Namespace) -> list[Region]:
        """Regions that can be assigned to the namespace now: its blocks fit them. Order as `unassigned`."""
        return [region for region in self.unassigned() if not misfit(region, namespace)]

    def begin_assign(self, region: Region, namespace: Namespace) -> bool:
        """UNASSIGNED → ASSIGNING. Returns whether the blocks must be scrubbed (they were another namespace's)."""
        region.state = RegionState.ASSIGNING
        region.namespace = namespace.id
        scrub = region.last_namespace is not None and region.last_namespace != namespace.id
        region.last_namespace = namespace.id
        return scrub

    def activate(self, region: Region, namespace: Namespace) -> None:
        """ASSIGNING → ACTIVE: the node has formatted it; its blocks are free."""
        layout = plan_region(region.offer.size_bytes, namespace.spec.block_bytes, namespace.spec.segments)
        region.layout = layout
        region.base = self.table.add_range(layout.block_count, region.number)
        self.base_of[region.number] = region.base
        region.free = np.arange(layout.block_count - 1, -1, -1, dtype=np.int32)
        region.free_count = layout.block_count
        region.state = RegionState.ACTIVE
        namespace.regions.add(region.number)

    def begin_return(self, region: Region, namespace: Namespace) -> None:
        """ACTIVE or VACATING → RETURNING: all its slots are free; the node is told to unassign it."""
        assert region.layout is not None
        assert region.free_count == region.block_count
        self.table.drop_range(region.base, region.block_count)
        namespace.regions.discard(region.number)
        region.layout = None
        region.free_count = 0
        region.state = RegionState.RETURNING

    def usable(self, namespace: Namespace) -> dict[str, list[Region]]:
        """Regions that new blocks of a namespace may go to, by node, nodes in order of their names."""
        out: dict[str, list[Region]] = {}
        for number in sorted(namespace.regions):
            region = self.regions[number]
            if region.state is RegionState.ACTIVE and self.nodes[region.node].state is NodeState.ACTIVE:
                out.setdefault(region.node, []).append(region)
        return dict(sorted(out.items()))

    def free_blocks(self, namespace: Namespace) -> int:
        """Blocks that can be allocated right now."""
        return sum(region.free_count for regions in self.usable(namespace).values() for region in regions)

    def capacity_blocks(self, namespace: Namespace) -> int:
        """Blocks of all the namespace's regions."""
        return sum(self.regions[number].block_count for number in namespace.regions)

    def give(self, slots: Slots) -> None:
        """Return FREE slots to their regions."""
        numbers = self.table.region[slots]
        for number in np.unique(numbers):
            self.regions[int(number)].give(slots[numbers == number])

    def locate(self, slots: Slots) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
        """Region number and block index of slots; slot -1 gives zeros."""
        known = slots >= 0
        region = np.where(known, self.table.region[slots], np.uint32(0)).astype(np.uint32)
        block = np.where(known, slots - self.base_of[region], 0).astype(np.uint32)
        return region, block

    def view(self, namespace: Namespace, epoch: int) -> View:
        """What clients of a namespace need to know."""
        regions = []
        names = set()
        for number in sorted(namespace.regions):
            region = self.regions[number]
            node = self.nodes[region.node]
            names.add(node.name)
            regions.append(
                RegionView(
                    number=number,
                    region_id=region.offer.region_id,
                    node=node.name,
                    incarnation=node.incarnation,
                    size_bytes=region.offer.size_bytes,
                    block_bytes=namespace.spec.block_bytes,
                    segments=namespace.spec.segments,
                    descriptor=region.offer.descriptor,
                )
            )
        nodes = [
            NodeView(name=node.name, incarnation=node.incarnation, host=node.host, state=node.state)
            for node in (self.nodes[name] for name in sorted(names))
        ]
        return View(
            epoch=epoch,
            version=namespace.view_version,
            namespace=namespace.spec.name,
            nodes=nodes,
            regions=regions,
        )

    def check_invariants(self) -> None:
        """Raise AssertionError when free lists and slots contradict each other. O(slots); for tests."""
        for region in self.regions.values():
            assert region.node in self.nodes
            if region.layout is None:
                continue
            assert region.state in (RegionState.ACTIVE, RegionState.VACATING)
            free = region.free[: region.free_count] + region.base
            assert len(np.unique(free)) == len(free), "a block is in the free list twice"
            state = self.table.state[region.base : region.base + region.block_count]
            assert not state[free - region.base].any(), "a block in use is in the free list"
            assert int((state == 0).sum()) == region.free_count, "a free block is missing from the free list"
