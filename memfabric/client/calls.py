"""Requests on their way, and what may happen to a session: the data of `session`."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

from memfabric.core.messages import Attached, Body, Refused, ReplyBody
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
