"""The frame codec: every message survives, everything else is a FrameError."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfabric import wire
from memfabric.core import messages as m
from memfabric.core.fingerprint import Fingerprint

U63 = st.integers(0, 2**63 - 1)
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**64 - 1),
    str: st.text(max_size=20),
    bytes: st.binary(max_size=64),
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
    dict[str, int]: st.dictionaries(st.text(max_size=5), U63, max_size=3),
    dict[str, Any]: st.dictionaries(st.text(max_size=5), U63 | st.text(max_size=5), max_size=3),
    list[int]: st.lists(U63, max_size=5),
    m.NodeState: st.sampled_from(list(m.NodeState)),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    if kind in SCALARS:
        return SCALARS[kind]
    arguments = getattr(kind, "__args__", None)
    if getattr(kind, "__origin__", None) is list:
        return st.lists(values(arguments[0]), max_size=2)
    if arguments:  # a union
        return st.one_of([st.none() if part is type(None) else values(part) for part in arguments])
    return structs(kind)


def structs(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Instances of a message type with arbitrary fields."""
    return st.deferred(
        lambda: st.builds(kind, **{field.name: values(field.type) for field in msgspec.structs.fields(kind)})
    )


ENVELOPES = (m.Request, m.Reply, m.Command, m.View, m.KvEvent)
MESSAGES = st.one_of([structs(kind) for kind in ENVELOPES])


@given(MESSAGES)
def test_every_message_survives_the_round_trip(message: Any) -> None:
    frame = wire.encode(message)
    assert wire.decode(frame, type(message)) == message
    assert wire.decode(memoryview(frame), *ENVELOPES) == message


@given(MESSAGES, st.data())
def test_a_truncated_frame_is_refused(message: Any, data: st.DataObject) -> None:
    frame = wire.encode(message)
    with pytest.raises(wire.FrameError):
        wire.decode(frame[: data.draw(st.integers(0, len(frame) - 1))], *ENVELOPES)


@given(MESSAGES, st.data())
def test_a_damaged_frame_is_a_message_or_a_frame_error(message: Any, data: st.DataObject) -> None:
    frame = bytearray(wire.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = wire.decode(bytes(frame), *ENVELOPES)
    except wire.FrameError:
        return
    assert isinstance(found, ENVELOPES)


@given(st.binary(max_size=200), st.sampled_from([b"", b"MF", b"MF\x01", b"MF\x01Q", b"MF\x01R"]))
def test_garbage_is_refused(garbage: bytes, prefix: bytes) -> None:
    try:
        found = wire.decode(prefix + garbage, *ENVELOPES)
    except wire.FrameError:
        return
    assert isinstance(found, ENVELOPES)


@given(MESSAGES)
def test_only_the_expected_kinds_are_taken(message: Any) -> None:
    others = [kind for kind in ENVELOPES if not isinstance(message, kind)]
    with pytest.raises(wire.FrameError, match="unexpected kind"):
        wire.decode(wire.encode(message), *others)


def test_another_protocol_version_is_named() -> None:
    frame = bytearray(wire.encode(m.Request(session=0, sequence=1, body=m.Ping())))
    frame[2] = 77
    with pytest.raises(wire.FrameError, match="version 77") as caught:
        wire.decode(bytes(frame), m.Request)
    assert caught.value.version == 77


def test_size_is_bounded_both_ways() -> None:
    huge = m.Request(session=0, sequence=1, body=m.Ping(touched=bytes(m.MAX_FRAME_BYTES)))
    with pytest.raises(wire.FrameError, match="over the limit"):
        wire.encode(huge)
    with pytest.raises(wire.FrameError, match="over the limit"):
        wire.decode(b"MF\x01Q" + bytes(m.MAX_FRAME_BYTES), m.Request)


def test_deep_nesting_is_refused() -> None:
    nested = b"MF\x01R" + b"\x81\xa1x" * 100_000
    with pytest.raises(wire.FrameError):
        wire.decode(nested, m.Reply)


@pytest.mark.parametrize("count", [-1, 2**64, 2**70, "3", 1.5, None])
def test_counts_of_the_wrong_type_or_range_are_refused(count: object) -> None:
    try:
        raw = msgspec.msgpack.encode({"session": 1, "sequence": count, "body": {"type": "ping"}})
    except OverflowError:
        return
    try:
        found = wire.decode(b"MF\x01Q" + raw, m.Request)
    except wire.FrameError:
        return
    assert isinstance(found.sequence, int)  # a negative one is a number like any other: the server refuses it


def test_unknown_fields_are_ignored_and_unknown_tags_refused() -> None:
    raw = msgspec.msgpack.encode(
        {"session": 1, "sequence": 2, "later": 3, "body": {"type": "match", "keys": b"", "x": 1}}
    )
    assert wire.decode(b"MF\x01Q" + raw, m.Request).body == m.Match(keys=b"")
    raw = msgspec.msgpack.encode({"session": 1, "sequence": 2, "body": {"type": "format_disk"}})
    with pytest.raises(wire.FrameError):
        wire.decode(b"MF\x01Q" + raw, m.Request)


def test_messages_carry_fingerprints() -> None:
    body = m.Attach(nonce=b"n" * 16, namespace="x", fingerprint=Fingerprint(model="a", layers=3))
    request = m.Request(session=0, sequence=1, body=body)
    assert wire.decode(wire.encode(request), m.Request) == request
