"""Placement: which node gets which new block.

Pure. Runs of `RUN_BLOCKS` consecutive blocks of a chain stay on one node, so that neighbours coalesce; successive
runs go
round the nodes, starting at a place given by the chain's first block. Striping runs balances better and gives a
long prompt more parallel reads than keying a run by its content, which would put every chain with a shared system
prompt on the same node. Nodes with more free memory get more of the turns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from memfabric.core.cluster import Region
from memfabric.core.table import Slots

RUN_BLOCKS = 16
_TURNS = 16
"""Turns in a round per node: the resolution of the weights."""


def turns(free_by_node: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """A round of turns (node positions) in which each node's share follows its free blocks, spread evenly.

    A node with free blocks has at least one turn. Empty when there is none.
    """
    total = int(free_by_node.sum())
    if total == 0:
        return np.empty(0, np.int64)
    positions: list[tuple[float, int]] = []
    for node, free in enumerate(free_by_node):
        share = max(1, round(_TURNS * len(free_by_node) * int(free) / total)) if free else 0
        positions.extend(((k + 0.5) / share, node) for k in range(share))
    return np.array([node for _, node in sorted(positions)], np.int64)


def place(nodes: list[list[Region]], stripe: npt.NDArray[np.uint16], depth: npt.NDArray[np.uint32]) -> Slots:
    """Take a free block for each new block; all of them must fit.

    Args:
        nodes: usable regions by node.
        stripe, depth: ``[n]``; hash of the chain's first block, and place in the chain.

    Returns:
        int32 ``[n]`` slots, ascending within a run where the free blocks allow it.
    """
    free = np.array([sum(region.free_count for region in regions) for regions in nodes], np.int64)
    count = len(depth)
    assert count <= int(free.sum())
    slots = np.empty(count, np.int32)
    if not count:
        return slots
    order = turns(free)
    wanted = order[(stripe.astype(np.int64) + depth.astype(np.int64) // RUN_BLOCKS) % len(order)]
    left_over = []
    for node in range(len(nodes)):
        positions = np.nonzero(wanted == node)[0]
        fit = min(len(positions), int(free[node]))
        slots[positions[:fit]] = _take(nodes[node], fit)
        free[node] -= fit
        left_over.append(positions[fit:])
    rest = np.sort(np.concatenate(left_over))
    for node in np.argsort(-free, kind="stable"):
        if not len(rest):
            break
        fit = min(len(rest), int(free[node]))
        slots[rest[:fit]] = _take(nodes[int(node)], fit)
        rest = rest[fit:]
    return slots


def _take(regions: list[Region], count: int) -> Slots:
    parts = []
    for region in regions:
        if not count:
            break
        fit = min(count, region.free_count)
        parts.append(region.take(fit))
        count -= fit
    return np.concatenate(parts) if parts else np.empty(0, np.int32)
