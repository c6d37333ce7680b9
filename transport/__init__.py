"""One-sided transports: memory that another process can read and write without the owner's help.

`transport.base` is the surface, `transport.shm` the same-host implementation. This package knows nothing of blocks,
keys or leases, and never imports memfabric. Importing it sets nothing and starts nothing.
"""

from transport._memory import Room, tightest_room
from transport._native import Digest, copy_limit, digest, digest_batch, digest_with, implementations
from transport.base import Batch, Capabilities, Outcome, Pending, Region, Transport, outcome
from transport.errors import (
    BoundsError,
    DescriptorError,
    NotConnectedError,
    NotWritableError,
    OutOfMemoryError,
    PeerLostError,
    RegionExistsError,
    TimedOutError,
    TransportError,
    UnreachableError,
    UnsupportedError,
)
from transport.registry import create
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
    "Outcome",
    "PeerLostError",
    "Pending",
    "Region",
    "RegionExistsError",
    "Room",
    "ShmRegion",
    "ShmTransport",
    "TimedOutError",
    "Transport",
    "TransportError",
    "UnreachableError",
    "UnsupportedError",
    "copy_limit",
    "create",
    "digest",
    "digest_batch",
    "digest_with",
    "implementations",
    "outcome",
    "tightest_room",
]
