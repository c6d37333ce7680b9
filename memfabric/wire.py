"""Frames: the bytes that carry messages over ZeroMQ.

One frame is ``b"MF"``, a protocol version byte, a kind byte, then MessagePack. Decoding checks the size, the prefix,
the version and every type before anything is believed; whatever does not fit raises `FrameError`, and nothing else.
Responsible for bytes only: it knows no socket and no meaning.
"""

from __future__ import annotations

from typing import Any, TypeVar, overload

import msgspec

from memfabric.core.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Command,
    KvEvent,
    Reply,
    Request,
    View,
)

_PREFIX = b"MF" + bytes([PROTOCOL_VERSION])
_KINDS: dict[type, bytes] = {Request: b"Q", Reply: b"R", Command: b"C", View: b"V", KvEvent: b"K"}
_DECODERS: dict[bytes, msgspec.msgpack.Decoder[object]] = {
    kind: msgspec.msgpack.Decoder(message) for message, kind in _KINDS.items()
}
_ENCODER = msgspec.msgpack.Encoder()

Message = Request | Reply | Command | View | KvEvent
M = TypeVar("M", bound=Message)
N = TypeVar("N", bound=Message)


class FrameError(ValueError):
    """Bytes that are not a valid frame. `version` is the sender's when it speaks another protocol version."""

    def __init__(self, message: str, *, version: int | None = None) -> None:
        super().__init__(message)
        self.version = version


def encode(message: Message) -> bytes:
    """One frame.

    Raises:
        FrameError: the message would be larger than `MAX_FRAME_BYTES`.
    """
    frame = _PREFIX + _KINDS[type(message)] + _ENCODER.encode(message)
    if len(frame) > MAX_FRAME_BYTES:
        raise FrameError(f"message of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return frame


@overload
def decode(frame: bytes | memoryview, first: type[M], /) -> M: ...
@overload
def decode(frame: bytes | memoryview, first: type[M], second: type[N], /) -> M | N: ...
def decode(frame: bytes | memoryview, *expected: type[Any]) -> Any:
    """The message in a frame, which must be one of the `expected` types.

    Raises:
        FrameError: too large, not ours, another version, another kind, truncated, or a field of the wrong type.
    """
    if len(frame) > MAX_FRAME_BYTES:
        raise FrameError(f"frame of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")
    head = bytes(frame[:4])
    if len(head) < 4 or head[:2] != _PREFIX[:2]:
        raise FrameError("not a memfabric frame")
    if head[2] != PROTOCOL_VERSION:
        raise FrameError(
            f"peer speaks protocol version {head[2]}, this program speaks {PROTOCOL_VERSION}; "
            "install the same memfabric release on both sides",
            version=head[2],
        )
    if head[3:] not in [_KINDS[message] for message in expected]:
        raise FrameError(f"unexpected kind of frame {head[3:]!r}")
    try:
        message = _DECODERS[head[3:]].decode(memoryview(frame)[4:])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"malformed frame: {error}") from None
    return message
