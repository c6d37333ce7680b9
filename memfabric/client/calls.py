"""Requests on their way, and what may happen to a session: the data of `session`."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

from memfabric.core.layout import LayoutError, check_block_shape
from memfabric.core.messages import Attach, Attached, Body, NamespaceSpec, Refused, ReplyBody
from memfabric.errors import MemfabricError, RefusedError


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A reply. `sent_ns` is when its request was first sent: leases count from there."""

    body: ReplyBody
    sent_ns: int
    epoch: int


@dataclasses.dataclass(eq=False, slots=True)
class Call:
    """A request on its way. `settle` is called once with its end; None for posted ones that nobody waits
    for."""

    body: Body
    deadline_ns: int
    settle: Callable[[Answer | MemfabricError], None] | None = None
    sequence: int = 0
    sent_ns: int = 0
    sends: int = 0
    resend_ns: int = 0
    queued: bool = False
    done: bool = False


class State(enum.Enum):
    """Of the session."""

    ATTACHING = "attaching"
    ATTACHED = "attached"
    REFUSED = "refused"
    """The server will not have us; tried again with the next request."""


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
    """Use a fresh connection with this identity from now on."""

    identity: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Joined:
    """A session is open."""

    attached: Attached
    epoch: int


Event = Opened | Joined


def refusal(body: Refused) -> RefusedError:
    """The error that a refusal is to callers."""
    retry_s = body.retry_after_ns / 1e9 if body.retry_after_ns else None
    return RefusedError(body.code, body.message, retry_after_s=retry_s)


def unlike(known: NamespaceSpec | None, asked: Attach, attached: Attached) -> str:
    """Why a session is not one to work with: its namespace is none, impossible, or not the one of the sessions before
    (deleted and created anew, perhaps while the server was away); empty when it is."""
    if not asked.namespace:
        return ""
    if attached.namespace is None:
        return "the server opened a session without the namespace that was asked for; is it another release?"
    spec = attached.namespace.spec
    try:
        check_block_shape(spec.block_bytes, spec.segments)
    except LayoutError as error:
        return f"the server has an impossible namespace {spec.name!r} ({error}); is it another release?"
    if known is None:
        return ""
    differences = known.fingerprint.differences(spec.fingerprint) + [
        f"{name}: {getattr(known, name)} before, {getattr(spec, name)} now"
        for name in ("block_bytes", "block_tokens", "segments")
        if getattr(known, name) != getattr(spec, name)
    ]
    if not differences:
        return ""
    return f"namespace {spec.name!r} was created anew and is another: {'; '.join(differences)}; connect again"
