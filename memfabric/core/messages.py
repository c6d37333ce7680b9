"""Every message on the wire, as data. Versioned, bounded, columnar.

Pure. Lists of blocks travel as packed columns (little-endian bytes that numpy reads in place), never as lists of
objects. Column types, for ``n`` blocks: ``keys``/``parents`` ``n × 16`` bytes; ``generation`` ``n × u64``; ``region``,
``block``, ``tokens`` ``n × u32``; ``status``/masks ``n × u8``.

A request carries a session and a sequence number: together they are its idempotency token. The same token
sent again gets the same answer and has no second effect.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from memfabric.core.fingerprint import Fingerprint

PROTOCOL_VERSION = 1
MAX_KEYS_PER_REQUEST = 8192
MAX_FRAME_BYTES = 8 << 20
MAX_NAME_BYTES = 64


class Wire(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of all messages; unknown fields are ignored, so that fields can be added within a version."""


# --- statuses (u8 columns) ---------------------------------------------------------------------------------------


class AcquireStatus(enum.IntEnum):
    """Per key of `Acquired.status`."""

    MISSING = 0
    GRANTED = 1


class ReserveStatus(enum.IntEnum):
    """Per key of `Reserved.status`."""

    GRANTED = 0
    EXISTS = 1
    PENDING = 2
    """Another writer holds it right now."""
    NO_SPACE = 3
    """Nothing free and nothing evictable; `Reserved.message` says what holds the space."""
    QUOTA = 4


class Written(enum.IntEnum):
    """Per block of `Commit.stored`: what the writer did."""

    NO = 0
    """Nothing, and nothing of it is on its way."""
    YES = 1
    UNKNOWN = 2
    """A connection was lost or a deadline passed during the write: it may still arrive."""


class CommitStatus(enum.IntEnum):
    """Per key of `Committed.status`."""

    STORED = 0
    SKIPPED = 1
    """The writer's mask said it was not written; the block is free again."""
    LOST = 2
    """The block's node died or was fenced between reserve and commit."""


class RemoveStatus(enum.IntEnum):
    """Per key of `Removed.status`."""

    REMOVED = 0
    MISSING = 1
    BUSY = 2
    """Under a lease; it becomes invisible now and is freed when the lease ends."""


# --- descriptions ------------------------------------------------------------------------------------------------


class NamespaceSpec(Wire, frozen=True, kw_only=True):
    """What a namespace shall be.

    Attributes:
        name: 1 to 64 of ``[A-Za-z0-9._-]``, not starting with a dot or dash.
        block_bytes: payload bytes of one block.
        block_tokens: tokens of one block.
        segments: independently readable parts of a block (one layer's K and V by default); divides block_bytes.
        fingerprint: what must agree between the engines that share the blocks.
        quota_bytes: limit on stored payload; 0 for none.
        policy: ``lru`` (leaf-first), ``window-lru`` or ``ttl``.
        window_ratio: `window-lru` only: share of the namespace that new, not yet reused blocks may hold.
        ttl_ns: a block not used (``ttl``: not written) for this long is dropped; 0 for never.
        high_ratio, low_ratio: watermarks of occupancy: above high the server evicts down to low ahead of need.
        partial: whether blocks with fewer than block_tokens tokens are accepted.
    """

    name: str
    block_bytes: int
    block_tokens: int = 16
    segments: int = 1
    fingerprint: Fingerprint = Fingerprint()
    quota_bytes: int = 0
    policy: str = "lru"
    window_ratio: float = 0.2
    ttl_ns: int = 0
    high_ratio: float = 0.95
    low_ratio: float = 0.90
    partial: bool = False


class NamespaceInfo(Wire, frozen=True, kw_only=True):
    """A namespace and how it is doing; counters since the server's start."""

    id: int
    spec: NamespaceSpec
    blocks: int = 0
    writing: int = 0
    quarantined: int = 0
    capacity_blocks: int = 0
    regions: int = 0
    counters: dict[str, int] = {}


class NodeState(enum.IntEnum):
    """Life of a node as the server sees it."""

    ACTIVE = 1
    DRAINING = 2
    DEAD = 3


class NodeView(Wire, frozen=True, kw_only=True):
    """A node as clients see it. `host` is the boot id of its machine."""

    name: str
    incarnation: int
    host: str
    state: NodeState


class RegionView(Wire, frozen=True, kw_only=True):
    """A region that belongs to the client's namespace. `number` is what location columns hold, in this epoch.

    `descriptor` is the transport's (opaque here); sizes give the layout (`core.layout.plan_region`).
    """

    number: int
    region_id: int
    node: str
    incarnation: int
    size_bytes: int
    block_bytes: int
    segments: int
    descriptor: bytes


class View(Wire, frozen=True, kw_only=True):
    """Membership for one namespace: complete, not a difference. A higher (epoch, version) replaces a lower."""

    epoch: int
    version: int
    namespace: str
    nodes: list[NodeView]
    regions: list[RegionView]


class KvEvent(Wire, frozen=True, kw_only=True):
    """Blocks that became readable or stopped being so; `sequence` has no gaps within (epoch, namespace)."""

    epoch: int
    sequence: int
    namespace: str
    stored: bytes = b""
    stored_parents: bytes = b""
    removed: bytes = b""
    cause: str = ""


class RegionOffer(Wire, frozen=True, kw_only=True):
    """A registered region a node lends."""

    region_id: int
    size_bytes: int
    descriptor: bytes


# --- requests ----------------------------------------------------------------------------------------------------


class Attach(Wire, tag="attach", frozen=True, kw_only=True):
    """Open a session. `nonce` is the connection's identity: the same connection asking again gets the same session, and
    the frame is worth nothing on another connection. Without a fingerprint the stored one is taken.

    `create`: create the namespace if it is not there; if it is, its fingerprint and block shape must agree.
    An empty `namespace` opens an administrative session.
    """

    nonce: bytes
    client: str = ""
    namespace: str = ""
    fingerprint: Fingerprint | None = None
    create: NamespaceSpec | None = None


class Ping(Wire, tag="ping", frozen=True, kw_only=True):
    """Keep the session alive; carries reuse that optimistic reads did not report yet."""

    touched: bytes = b""


class Detach(Wire, tag="detach", frozen=True, kw_only=True):
    """End the session now. The client promises that nothing of it writes any more: its blocks are free at once."""


class GetView(Wire, tag="get_view", frozen=True, kw_only=True):
    """Ask for the current view of the session's namespace."""


class Match(Wire, tag="match", frozen=True, kw_only=True):
    """How many leading keys are readable? Counts as a use of them."""

    keys: bytes


class Acquire(Wire, tag="acquire", frozen=True, kw_only=True):
    """Lease blocks for reading. `prefix`: stop at the first key that is missing."""

    keys: bytes
    ttl_ns: int
    prefix: bool = False


class Reserve(Wire, tag="reserve", frozen=True, kw_only=True):
    """Lease fresh blocks for writing. Keys must be distinct; `tokens` per block."""

    keys: bytes
    parents: bytes
    tokens: bytes
    ttl_ns: int


class Commit(Wire, tag="commit", frozen=True, kw_only=True):
    """Make written blocks readable. `stored` has a `Written` for each block that the reservation granted, in order.

    Blocks that were not written are freed, those that may still be written to go into quarantine. The lease ends.
    """

    lease: int
    stored: bytes


class Abort(Wire, tag="abort", frozen=True, kw_only=True):
    """Give a reservation up; the writer promises that it no longer writes (``flushed``) or cannot tell."""

    lease: int
    flushed: bool = True


class Renew(Wire, tag="renew", frozen=True, kw_only=True):
    """Extend leases of this session to `ttl_ns` from now."""

    leases: list[int]
    ttl_ns: int


class Release(Wire, tag="release", frozen=True, kw_only=True):
    """End read leases of this session; unknown ones are ignored (they have ended)."""

    leases: list[int]


class Remove(Wire, tag="remove", frozen=True, kw_only=True):
    """Forget blocks."""

    keys: bytes


class Pin(Wire, tag="pin", frozen=True, kw_only=True):
    """Keep readable blocks from being evicted or expiring until they are unpinned (`pinned` false) or removed."""

    keys: bytes
    pinned: bool = True


class ReportFailure(Wire, tag="report_failure", frozen=True, kw_only=True):
    """These blocks, at these generations, did not verify under a valid lease: drop them."""

    keys: bytes
    generation: bytes


class ListBlocks(Wire, tag="list_blocks", frozen=True, kw_only=True):
    """Page through readable blocks in slot order; `cursor` 0 starts, `Blocks.cursor` continues."""

    cursor: int = 0
    limit: int = 1000


class Explain(Wire, tag="explain", frozen=True, kw_only=True):
    """Everything the server knows about a key."""

    key: bytes


class NamespaceCreate(Wire, tag="namespace_create", frozen=True, kw_only=True):
    """Create a namespace; the same spec again is done already, another spec under the name is refused."""

    spec: NamespaceSpec


class NamespaceList(Wire, tag="namespace_list", frozen=True, kw_only=True):
    """All namespaces."""


class NamespaceDelete(Wire, tag="namespace_delete", frozen=True, kw_only=True):
    """Drop a namespace and its blocks. Refused while it holds blocks or sessions unless `force`."""

    name: str
    force: bool = False


class GetStatus(Wire, tag="get_status", frozen=True, kw_only=True):
    """The whole pool at a glance."""


class NodeDrain(Wire, tag="node_drain", frozen=True, kw_only=True):
    """Put no new blocks on a node (`undo`: again). Its blocks stay readable until they are evicted."""

    node: str
    undo: bool = False


class Introduce(Wire, tag="introduce", frozen=True, kw_only=True):
    """Carry a transport's hello to a node and bring back its welcome (`Introduced`).

    Attributes:
        node, incarnation: one that holds regions of the session's namespace, in that life.
        identity: 16 bytes; by which name the node knows this client's transports.
        hello: opaque; which transport it is for is part of it.
    """

    node: str
    incarnation: int
    identity: bytes
    hello: bytes


class Register(Wire, tag="register", frozen=True, kw_only=True):
    """A node announces itself and the regions that it lends. `transports`: by which, for people."""

    node: str
    incarnation: int
    host: str
    regions: list[RegionOffer]
    transports: list[str] = []


class Heartbeat(Wire, tag="heartbeat", frozen=True, kw_only=True):
    """A node lives."""

    node: str
    incarnation: int


class CommandDone(Wire, tag="command_done", frozen=True, kw_only=True):
    """A node's answer to a `Command`; `error` is empty on success. `answer`: the welcome, of an `Accept`."""

    node: str
    incarnation: int
    command: int
    error: str = ""
    answer: bytes = b""


class Unregister(Wire, tag="unregister", frozen=True, kw_only=True):
    """A node leaves in good order: its blocks are gone now."""

    node: str
    incarnation: int


Body = (
    Attach
    | Ping
    | Detach
    | GetView
    | Match
    | Acquire
    | Reserve
    | Commit
    | Abort
    | Renew
    | Release
    | Remove
    | Pin
    | ReportFailure
    | ListBlocks
    | Explain
    | NamespaceCreate
    | NamespaceList
    | NamespaceDelete
    | GetStatus
    | NodeDrain
    | Introduce
    | Register
    | Heartbeat
    | CommandDone
    | Unregister
)


class Request(Wire, frozen=True, kw_only=True):
    """Envelope of a request.

    Attributes:
        session: from `Attached`; 0 for `Attach` and for node messages (which carry their own incarnation).
        sequence: rises by one per request of a session; with `session` the idempotency token.
    """

    session: int
    sequence: int
    body: Body


# --- replies -----------------------------------------------------------------------------------------------------


class Refused(Wire, tag="refused", frozen=True, kw_only=True):
    """Nothing happened. `code` is one of `errors.RefusalCode`. `retry_after_ns` 0: a retry cannot help."""

    code: str
    message: str
    retry_after_ns: int = 0


class Done(Wire, tag="done", frozen=True, kw_only=True):
    """It happened; nothing more to say."""


class Attached(Wire, tag="attached", frozen=True, kw_only=True):
    """A session. Requests of it must carry `session` and come from the same connection identity.

    `events` is the address of the PUB socket. Topics: ``view/NAME\\0`` (a `View`), ``kv/NAME\\0stored`` and
    ``kv/NAME\\0removed`` (a `KvEvent`); the zero byte ends the name, so that no name is a prefix of another.
    """

    session: int
    max_keys: int
    max_lease_ns: int
    session_ttl_ns: int
    events: str
    namespace: NamespaceInfo | None = None
    view: View | None = None


class Matched(Wire, tag="matched", frozen=True, kw_only=True):
    """`count` leading keys are readable."""

    count: int


class Acquired(Wire, tag="acquired", frozen=True, kw_only=True):
    """Locations; entries of missing keys are zeros. `lease` 0 when nothing was granted.

    `ttl_ns` counts, for the client, from the moment it *sent* the request (conservative).
    """

    lease: int
    ttl_ns: int
    status: bytes
    region: bytes
    block: bytes
    generation: bytes


class Reserved(Wire, tag="reserved", frozen=True, kw_only=True):
    """As `Acquired`, for writing. `message` explains refusals; `retry_after_ns` > 0 asks to slow down."""

    lease: int
    ttl_ns: int
    status: bytes
    region: bytes
    block: bytes
    generation: bytes
    message: str = ""
    retry_after_ns: int = 0


class Committed(Wire, tag="committed", frozen=True, kw_only=True):
    """Per block of the reservation's granted blocks, in order: `CommitStatus`."""

    status: bytes


class Renewed(Wire, tag="renewed", frozen=True, kw_only=True):
    """Per lease: the new ttl from the moment of sending, or 0 where the lease has ended."""

    ttl_ns: list[int]


class Pinned(Wire, tag="pinned", frozen=True, kw_only=True):
    """Per key: 1 where the block is readable and now pinned or unpinned as asked, 0 where it is not there."""

    status: bytes


class Removed(Wire, tag="removed", frozen=True, kw_only=True):
    """Per key: `RemoveStatus`."""

    status: bytes


class Blocks(Wire, tag="blocks", frozen=True, kw_only=True):
    """A page of readable blocks; `cursor` 0 when there is no more. `age_ns`: since last use (u64 column)."""

    cursor: int
    keys: bytes = b""
    parents: bytes = b""
    region: bytes = b""
    block: bytes = b""
    tokens: bytes = b""
    reuse: bytes = b""
    age_ns: bytes = b""


class Namespaces(Wire, tag="namespaces", frozen=True, kw_only=True):
    """All namespaces."""

    items: list[NamespaceInfo]


class Document(Wire, tag="document", frozen=True, kw_only=True):
    """A free-form answer for people and scripts (status, explain); its keys are documented in docs/cli.md."""

    doc: dict[str, Any]


class ViewReply(Wire, tag="view", frozen=True, kw_only=True):
    """Answer to `GetView`."""

    view: View


class Introduced(Wire, tag="introduced", frozen=True, kw_only=True):
    """The node's welcome; opaque."""

    welcome: bytes


class Registered(Wire, tag="registered", frozen=True, kw_only=True):
    """The node is in. It sends a heartbeat every `heartbeat_ns`; after `dead_ns` of silence it is out."""

    heartbeat_ns: int
    dead_ns: int


ReplyBody = (
    Refused
    | Done
    | Attached
    | Matched
    | Acquired
    | Reserved
    | Committed
    | Renewed
    | Removed
    | Pinned
    | Blocks
    | Namespaces
    | Document
    | ViewReply
    | Introduced
    | Registered
)


class Reply(Wire, frozen=True, kw_only=True):
    """Envelope of a reply; `epoch` says which incarnation of the service answered."""

    session: int
    sequence: int
    epoch: int
    body: ReplyBody


# --- commands to nodes -------------------------------------------------------------------------------------------


class Assign(Wire, tag="assign", frozen=True, kw_only=True):
    """Give a region to a namespace: zero its headers (and scrub its blocks if `scrub`), then write the superblock."""

    region_id: int
    namespace: str
    namespace_id: int
    fingerprint_digest: bytes
    block_bytes: int
    segments: int
    scrub: bool


class Unassign(Wire, tag="unassign", frozen=True, kw_only=True):
    """Take a region back: its superblock says unassigned."""

    region_id: int


class Accept(Wire, tag="accept", frozen=True, kw_only=True):
    """A client's hello; the node's welcome comes as `CommandDone.answer`."""

    identity: bytes
    hello: bytes


class Command(Wire, frozen=True, kw_only=True):
    """Envelope of a command; the node answers with `CommandDone` and does a repeated one once."""

    command: int
    epoch: int
    incarnation: int
    body: Assign | Unassign | Accept
