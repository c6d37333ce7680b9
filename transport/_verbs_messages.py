"""What verbs transports tell one another: descriptors, hellos and welcomes, as MessagePack arrays of plain numbers.

A descriptor says which registration of which owner; the keys to the memory come with the welcome only.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from transport import base
from transport.errors import DescriptorError

VERSION = 1
MAX_REGION_BYTES = 1 << 46
_UINT64_BYTES = Annotated[int, msgspec.Meta(ge=0)]  # msgspec takes integers up to 2^64 - 1
_UINT32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_UINT24 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]
_UINT16 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
_Nonce = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class Descriptor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Names one registration of one life of one owner."""

    transport: str
    version: int
    owner: _Nonce
    region_id: _UINT64_BYTES
    serial: _UINT64_BYTES
    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_REGION_BYTES)]
    writable: bool
    ethernet: bool


class Queue(msgspec.Struct, frozen=True, array_like=True):
    """One end of a connection.

    Attributes:
        number, sequence: Queue pair number and first packet sequence number.
        lid, gid: Where its port is.
        mtu: Of its port as libibverbs counts: 1 is 256 bytes, 5 is 4096.
        reads: RDMA reads that it has outstanding (the client's end) or answers at once (the owner's).
    """

    number: _UINT24
    sequence: _UINT24
    lid: _UINT16
    gid: _Nonce
    mtu: Annotated[int, msgspec.Meta(ge=1, le=5)]
    reads: Annotated[int, msgspec.Meta(ge=1, le=255)]


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """A client asks for regions, and for a connection where it has none.

    Attributes:
        writable: The connection may write. Rights are the queue pair's: on one that may only read no key helps.
        regions: Of (region id, serial).
    """

    version: int
    owner: _Nonce
    writable: bool
    queue: Queue | None
    regions: Annotated[list[tuple[_UINT64_BYTES, _UINT64_BYTES]], msgspec.Meta(max_length=4096)]


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    """The owner's answer.

    Attributes:
        queue: Its end of the connection, if one was asked for.
        regions: As in the hello; of each its pieces (offset, length, address, key), none if it is not lent any more.
    """

    version: int
    queue: Queue | None
    regions: list[list[tuple[_UINT64_BYTES, _UINT64_BYTES, _UINT64_BYTES, _UINT32]]]


_Message = TypeVar("_Message", Descriptor, Hello, Welcome)
encode = msgspec.msgpack.Encoder().encode
_DECODERS = {kind: msgspec.msgpack.Decoder(kind) for kind in (Descriptor, Hello, Welcome)}


def decode(kind: type[_Message], raw: bytes) -> _Message:
    """Parse what may be anything.

    Raises:
        DescriptorError: It isn't one, or of another version.
    """
    what = {Descriptor: "descriptor of a verbs region", Hello: "hello", Welcome: "welcome"}[kind]
    if kind is Descriptor and len(raw) > base.MAX_DESCRIPTOR_BYTES:
        raise DescriptorError(f"a descriptor of {len(raw)} bytes is too long")
    try:
        found = _DECODERS[kind].decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, RecursionError) as error:
        raise DescriptorError(f"not a {what}: {error}") from error
    assert isinstance(found, kind)
    if isinstance(found, Descriptor) and found.transport != "verbs":
        raise DescriptorError(f"a descriptor of transport {found.transport[:32]!r}, not of verbs")
    if found.version != VERSION:
        raise DescriptorError(f"a {what} of version {found.version}; this program speaks version {VERSION}")
    return found
