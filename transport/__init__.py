"""One-sided transports: memory that another process can read and write without the owner's help.

`transport.base` is the surface, `transport.shm` the same-host implementation. This package knows nothing of blocks,
keys or leases, and never imports memfabric. Importing it sets nothing and starts nothing.
"""

from transport._memory import Room, tightest_room
from transport._native import Digest, copy_limit, digest, digest_batch, digest_with, implementations
from transport.base import (
    Batch,
    BoundsError,
    Capabilities,
    DescriptorError,
    NotConnectedError,
    NotWritableError,
    OutOfMemoryError,
    PeerLostError,
    Region,
    RegionExistsError,
    Transport,
    TransportError,
    UnreachableError,
)
from transport.shm import ShmRegion, ShmTransport

__all__ = [
    "Batch",
    "BoundsError",
    "Capabilities",
    "DescriptorError",
    "Digest",
    "NotConnectedError",
    "NotWritableError",
    "OutOfMemoryError",
    "PeerLostError",
    "Region",
    "RegionExistsError",
    "Room",
    "ShmRegion",
    "ShmTransport",
    "Transport",
    "TransportError",
    "UnreachableError",
    "copy_limit",
    "digest",
    "digest_batch",
    "digest_with",
    "implementations",
    "tightest_room",
]
