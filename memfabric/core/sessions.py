"""Sessions: who is asking, and the answers that were already given.

Pure. A session belongs to one connection identity. Its requests carry a rising sequence number; (session, sequence)
is the
idempotency token: the answer to a request that changed something is kept, and given again if the same token comes
again. A token too old to be remembered is refused, never executed again.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import msgspec

from memfabric.core.messages import ReplyBody
from memfabric.errors import RefusalCode, RefusedError

REMEMBERED_REPLIES = 256
"""Per session; a client keeps at most half as many requests in flight."""
REMEMBERED_BYTES = 4 << 20


@dataclasses.dataclass
class Session:
    """One attached client. `namespace` None: administrative."""

    id: int
    peer: bytes
    client: str
    namespace: int | None
    last_seen_ns: int
    replies: OrderedDict[int, tuple[ReplyBody, int]] = dataclasses.field(default_factory=OrderedDict)
    reply_bytes: int = 0
    floor: int = 0
    """Tokens up to here are forgotten."""

    def remembered(self, sequence: int) -> ReplyBody | None:
        """The answer given before, or None if the token is new.

        Raises:
            RefusedError: the token is older than what is remembered; whether it was executed is not known any more.
        """
        found = self.replies.get(sequence)
        if found is not None:
            return found[0]
        if sequence <= self.floor:
            raise RefusedError(
                RefusalCode.STALE_TOKEN,
                f"request {sequence} of this session is too old to be repeated (oldest remembered: {self.floor + 1})",
            )
        return None

    def remember(self, sequence: int, body: ReplyBody) -> None:
        """Keep an answer; the oldest go when there are too many or they are too large."""
        size = _size(body)
        self.replies[sequence] = (body, size)
        self.reply_bytes += size
        while len(self.replies) > REMEMBERED_REPLIES or (self.reply_bytes > REMEMBERED_BYTES and len(self.replies) > 1):
            oldest, (_, freed) = self.replies.popitem(last=False)
            self.reply_bytes -= freed
            self.floor = max(self.floor, oldest)


def _size(body: ReplyBody) -> int:
    return 64 + sum(len(value) for value in msgspec.structs.astuple(body) if isinstance(value, (bytes, str)))


class Sessions:
    """All sessions, by id and by attach nonce."""

    def __init__(self, epoch: int, limit: int) -> None:
        self._next_id = (epoch << 32) + 1
        self._limit = limit
        self._sessions: dict[int, Session] = {}
        self._by_peer: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, session: int) -> bool:
        return session in self._sessions

    def open(self, peer: bytes, client: str, namespace: int | None, now_ns: int) -> Session:
        """A new session for a connection.

        Raises:
            RefusedError: too many sessions.
        """
        if len(self._sessions) >= self._limit:
            raise RefusedError(
                RefusalCode.OVERLOADED,
                f"the server has {len(self._sessions)} sessions, its limit; close idle clients",
                retry_after_s=1.0,
            )
        session = Session(self._next_id, peer, client, namespace, now_ns)
        self._next_id += 1
        self._sessions[session.id] = session
        self._by_peer[peer] = session.id
        return session

    def of_peer(self, peer: bytes) -> Session | None:
        """The session a connection has, if any."""
        found = self._by_peer.get(peer)
        return None if found is None else self._sessions[found]

    def get(self, session: int, peer: bytes, now_ns: int) -> Session:
        """The session, if it belongs to the connection; its life is prolonged.

        Raises:
            RefusedError: unknown, ended, or another connection's.
        """
        found = self._sessions.get(session)
        if found is None or found.peer != peer:
            raise RefusedError(
                RefusalCode.UNKNOWN_SESSION, f"session {session} is not open on this connection; attach again"
            )
        found.last_seen_ns = now_ns
        return found

    def find(self, session: int) -> Session | None:
        """The session, if it is open."""
        return self._sessions.get(session)

    def close(self, session: Session) -> None:
        """Forget the session; its leases must have ended."""
        del self._sessions[session.id]
        self._by_peer.pop(session.peer, None)

    def all(self) -> list[Session]:
        """Every session, in order of opening."""
        return list(self._sessions.values())
