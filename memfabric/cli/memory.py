"""How much memory nodes lend when nobody says, and whether what somebody says is there.

A node finds out itself that memory is short, but only when it has claimed all that there is; so ask before.
"""

from __future__ import annotations

from pathlib import Path

from memfabric import units
from memfabric.cli.output import plural
from memfabric.errors import RefusalCode, RefusedError
from memfabric.units import GIB, MIB

SHARED_MEMORY = Path("/dev/shm")
DIRECTORY_VARIABLE = "MEMFABRIC_SHM_DIRECTORY"
"""Names another place than `SHARED_MEMORY`, for nodes and clients alike."""
_SMALLEST_BYTES = 16 * MIB
_REGIONS = 8
"""Regions of a small node: each namespace takes at least one of each node, so there should be a few."""


def default_memory_bytes(directory: Path = SHARED_MEMORY, nodes: int = 1) -> int:
    """Per node 1 GiB, at most a quarter of what is free, and for all `nodes` together at most half of it.

    Raises:
        OSError: the directory cannot be asked.
    """
    from transport import tightest_room

    share = tightest_room(directory).free_bytes // max(4, 2 * nodes)
    return max(_SMALLEST_BYTES, min(GIB, share // MIB * MIB))


def default_region_bytes(memory_bytes: int) -> int:
    """An eighth of a node's memory, in whole MiB, from 1 MiB to 1 GiB."""
    return max(MIB, min(GIB, memory_bytes // _REGIONS // MIB * MIB))


def whole_regions(memory_bytes: int, region_bytes: int) -> int:
    """What a node lends of its memory: whole regions. As it is where not even one fits; the node refuses that."""
    return memory_bytes // region_bytes * region_bytes if 0 < region_bytes <= memory_bytes else memory_bytes


def check_room(directory: Path, memory_bytes: int, nodes: int = 1) -> None:
    """Refuse at once what cannot be backed.

    Raises:
        RefusedError: `nodes` nodes of `memory_bytes` are more than is free; says what limits and what to do.
        OSError: the directory cannot be asked.
    """
    from transport import tightest_room

    room = tightest_room(directory)
    if nodes * memory_bytes > room.free_bytes:
        wanted = f"{plural(nodes, 'node')} of {units.format_bytes(memory_bytes)}" if nodes > 1 else "the node"
        raise RefusedError(
            RefusalCode.NO_SPACE,
            f"{wanted} would need {units.format_bytes(nodes * memory_bytes)} of shared memory, but {room.source} "
            f"allows only {units.format_bytes(room.free_bytes)}; nothing was started. "
            f"{room.advice[0].upper()}{room.advice[1:]} (--memory).",
        )
