"""What loopback transports say to one another, and what they check of what they are given."""

from __future__ import annotations

import msgspec
import numpy as np

from transport import base
from transport.base import Batch
from transport.errors import DescriptorError

VERSION = 1


class Descriptor(msgspec.Struct, frozen=True):
    """What stands in a descriptor."""

    transport: str
    version: int
    profile: str
    host: str
    owner: bytes
    region_id: int
    serial: int
    size_bytes: int


class Hello(msgspec.Struct, frozen=True):
    """From a client that connects by an exchange."""

    transport: str
    version: int
    owner: bytes


class Welcome(msgspec.Struct, frozen=True):
    """The owner's answer: which connection."""

    owner: bytes
    number: int


encode = msgspec.msgpack.Encoder().encode
_descriptors = msgspec.msgpack.Decoder(Descriptor)
_hellos = msgspec.msgpack.Decoder(Hello)
_welcomes = msgspec.msgpack.Decoder(Welcome)
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, TypeError, RecursionError)


def decode_descriptor(descriptor: bytes) -> Descriptor:
    """Raises: DescriptorError."""
    if len(descriptor) > base.MAX_DESCRIPTOR_BYTES:
        raise DescriptorError(f"a descriptor of {len(descriptor)} bytes is too long")
    try:
        told = _descriptors.decode(descriptor)
    except _MALFORMED as error:
        raise DescriptorError(f"not a descriptor of a loopback region: {error}") from error
    if told.transport != "loopback":
        raise DescriptorError(f"a descriptor of transport {told.transport[:32]!r}, not of loopback")
    if told.version != VERSION:
        raise DescriptorError(f"a loopback descriptor of version {told.version}; this program reads {VERSION}")
    return told


_COLUMNS = (
    ("local", np.dtype(np.uint64)),
    ("region", np.dtype(np.int32)),
    ("offset", np.dtype(np.uint64)),
    ("length", np.dtype(np.uint64)),
    ("status", np.dtype(np.uint8)),
    ("group", np.dtype(np.int32)),
    ("digest", np.dtype(np.uint64)),
)


def check_columns(batch: Batch) -> None:
    """Raises: TypeError, ValueError, BufferError: a column is not as `Batch` describes it."""
    count = len(batch.local)
    for name, dtype in _COLUMNS:
        column = getattr(batch, name)
        if column is None and name in ("group", "digest"):
            continue
        if not isinstance(column, np.ndarray):
            raise TypeError(f"column {name} must be an array, got {type(column).__name__}")
        if column.dtype != dtype or column.ndim != 1 or not column.flags.c_contiguous:
            raise ValueError(f"column {name} must be a one-dimensional contiguous array of {dtype}")
        if name != "digest" and len(column) != count:
            raise ValueError(f"column {name} has {len(column)} entries, expected {count}")
        if name in ("status", "digest") and not column.flags.writeable:
            raise BufferError(f"column {name} must be writable")


def decode_hello(hello: bytes) -> Hello:
    """Raises: DescriptorError."""
    try:
        told = _hellos.decode(hello)
    except _MALFORMED as error:
        raise DescriptorError(f"not a hello of the loopback transport: {error}") from error
    if told.transport != "loopback" or told.version != VERSION:
        raise DescriptorError(f"a hello of {told.transport[:32]!r} version {told.version}; this is {VERSION}")
    return told


def decode_welcome(welcome: bytes) -> Welcome:
    """Raises: DescriptorError."""
    try:
        return _welcomes.decode(welcome)
    except _MALFORMED as error:
        raise DescriptorError(f"not a welcome of the loopback transport: {error}") from error
