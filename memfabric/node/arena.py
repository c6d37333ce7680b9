"""A node's memory: regions, their superblocks, and what commands do to them.

Responsible for the bytes that describe a region; the blocks' bytes are written and read by clients, one-sidedly.
It knows no sockets.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

import transport
from memfabric.core import layout
from memfabric.core.messages import Accept, Assign, RegionOffer, Unassign
from memfabric.node.options import NodeOptions
from transport.auto import OWNER_BYTES, combine, read_hello

_SCRUB_STEP_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class CommandResult:
    """`error`: empty on success. `answer`: to a client's hello."""

    error: str = ""
    answer: bytes = b""


class Arena:
    """All regions of one incarnation of a node."""

    def __init__(
        self,
        shm: transport.ShmTransport,
        options: NodeOptions,
        fabrics: Mapping[str, transport.Transport] | None = None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Back all regions with memory.

        Args:
            fabrics: transports by which the regions are lent beside shared memory, by name. The arena closes them with
                itself: what clients of another life may still have on its way must never reach this one.
            progress: called with the bytes backed so far.

        Raises:
            transport.OutOfMemoryError: memory is short; nothing is left behind.
        """
        self.incarnation = int.from_bytes(os.urandom(7), "little") + 1
        self._node = options.name
        self._fabrics = dict(fabrics or {})
        self._regions: dict[int, transport.Region] = {}
        self._lent: dict[int, list[transport.Region]] = {}
        self._done: dict[tuple[int, int], CommandResult] = {}
        self._accepted: dict[tuple[int, int], CommandResult] = {}
        self._accepting = threading.Lock()
        room = transport.tightest_room(options.directory)
        wanted = options.region_count * options.region_bytes
        if wanted > room.free_bytes:  # said before the first region takes its share, not after the last that fitted
            raise transport.OutOfMemoryError(
                f"{wanted} bytes of regions were asked for, but {room.source} allows only {room.free_bytes}; "
                f"{room.advice}"
            )
        try:
            for number in range(options.region_count):
                region_id = int.from_bytes(os.urandom(7), "little") + 1
                backed = number * options.region_bytes

                def report(in_region: int, backed: int = backed) -> None:
                    if progress is not None:
                        progress(backed + in_region)

                region = shm.create_region(options.name, region_id, options.region_bytes, progress=report)
                self._regions[region_id] = region
                self._lent[region_id] = []
                for fabric in self._fabrics.values():
                    self._lent[region_id].append(fabric.register(region.buffer, region_id))
                self._write_superblock(region, layout.Superblock(region_id, self._node, self.incarnation, 0))
        except BaseException:
            self.close()
            raise

    def offers(self) -> list[RegionOffer]:
        """What to register."""
        owner = self.incarnation.to_bytes(OWNER_BYTES, "little")
        offers = []
        for region_id, region in self._regions.items():
            lent = zip(self._fabrics, self._lent[region_id], strict=True)
            parts = [("shm", region.descriptor), *((name, other.descriptor) for name, other in lent)]
            offers.append(
                RegionOffer(region_id=region_id, size_bytes=region.size_bytes, descriptor=combine(owner, parts))
            )
        return offers

    def accept(self, epoch: int, command: int, body: Accept) -> CommandResult:
        """Answer a client's hello, once however often it comes."""
        with self._accepting:
            token = (epoch, command)
            if token not in self._accepted:
                try:
                    name, hello = read_hello(body.hello)
                    fabric = self._fabrics.get(name)
                    if fabric is None:
                        raise transport.UnsupportedError(f"regions are not lent over {name[:64]!r} here")
                    self._accepted[token] = CommandResult("", fabric.accept(hello, body.identity))
                except (transport.TransportError, ValueError) as error:
                    self._accepted[token] = CommandResult(str(error) or repr(error))
                while len(self._accepted) > 1000:
                    del self._accepted[next(iter(self._accepted))]
            return self._accepted[token]

    @property
    def transports(self) -> list[str]:
        """By which the regions are lent."""
        return ["shm", *self._fabrics]

    def execute(self, epoch: int, command: int, body: Assign | Unassign) -> CommandResult:
        """Do a command, once however often it comes."""
        token = (epoch, command)
        if token not in self._done:
            try:
                self._execute(epoch, body)
                self._done[token] = CommandResult()
            except (layout.LayoutError, transport.TransportError) as error:
                self._done[token] = CommandResult(str(error) or repr(error))
            while len(self._done) > 10_000:
                del self._done[next(iter(self._done))]
        return self._done[token]

    def _execute(self, epoch: int, body: Assign | Unassign) -> None:
        region = self._regions.get(body.region_id)
        if region is None:
            raise layout.LayoutError(f"region {body.region_id:#x} is not this node's")
        if isinstance(body, Unassign):
            self._write_superblock(region, layout.Superblock(body.region_id, self._node, self.incarnation, epoch))
            return
        plan = layout.plan_region(region.size_bytes, body.block_bytes, body.segments)
        memory = _bytes_of(region)
        if body.scrub:
            # What another namespace stored must not be readable by the next owner, whatever that one's client does.
            for start in range(plan.data_offset, region.size_bytes, _SCRUB_STEP_BYTES):
                memory[start : start + _SCRUB_STEP_BYTES] = 0
        memory[layout.SUPERBLOCK_BYTES : plan.data_offset] = 0
        self._write_superblock(
            region,
            layout.Superblock(
                region_id=body.region_id,
                node=self._node,
                incarnation=self.incarnation,
                epoch=epoch,
                state=layout.RegionState.ACTIVE,
                namespace=body.namespace,
                namespace_id=body.namespace_id,
                fingerprint_digest=body.fingerprint_digest,
                block_bytes=plan.block_bytes,
                block_count=plan.block_count,
                segments=plan.segments,
                header_stride=plan.header_stride,
            ),
        )

    def _write_superblock(self, region: transport.Region, superblock: layout.Superblock) -> None:
        _bytes_of(region)[: layout.SUPERBLOCK_BYTES] = np.frombuffer(superblock.pack(), np.uint8)

    def close(self) -> None:
        """Give all memory back; clients that still map a region keep reading their own view of it.

        The other transports end first: when the memory goes, nothing that comes over them can reach it any more.
        """
        for lent in self._lent.values():
            for other in lent:
                other.close()
        self._lent.clear()
        for fabric in self._fabrics.values():
            fabric.close()
        for region in self._regions.values():
            region.close()
        self._regions.clear()


def _bytes_of(region: transport.Region) -> npt.NDArray[Any]:
    return np.frombuffer(region.buffer, np.uint8)
