"""What a sweep and its processes say to each other: one JSON object a line, over pipes.

A command gets one answer. Meanwhile a client may ask for an `Exchange` with the owner, which the sweep carries over.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec


class _Message(msgspec.Struct, kw_only=True, tag=True, forbid_unknown_fields=True):
    pass


# --- commands to an owner of regions ---


class Lend(_Message):
    """Make a transport and a region on it. Answer: `Lent`."""

    transport: str
    options: dict[str, Any]
    size_bytes: int


class Accept(_Message):
    """Answer a client's hello. Answer: `Welcome`."""

    hello: bytes
    identity: bytes


# --- commands to a client ---


class OpenRegion(_Message):
    """Connect to an owner's region. Answer: `Opened`."""

    transport: str
    options: dict[str, Any]
    descriptor: bytes
    kind: str
    stream_port: int


class OpenPool(_Message):
    """Remember how to reach a pool. Answer: `Opened`."""

    address: str
    transport: str
    options: dict[str, Any]
    directory: str
    kind: str
    stream_port: int


class Prepare(_Message):
    """Get a point ready: fill, check that the right bytes come back, warm up. Answer: `Ready`.

    Attributes:
        span: first byte and length of this client's part of the region.
        namespace: of the pool.
        seed: of this visit, for keys and bytes; another one for each client and visit.
    """

    op: str
    block_bytes: int
    batch: int
    depth: int
    threads: int
    set_count: int
    verify: bool
    random_order: bool
    span: tuple[int, int]
    namespace: str
    seed: int


class Run(_Message):
    """Do something for some time. Answer: `Ran`.

    Attributes:
        what: ``op``, ``memcpy`` or ``socket``.
        start_ns: on CLOCK_MONOTONIC; the same for all clients.
        window_ns: no operation is begun after this.
    """

    what: str
    start_ns: int
    window_ns: int


class Finish(_Message):
    """Give back what `Prepare` took; an owner has nothing to give back, and shows that it lives. Answer: `Done`."""


# --- answers ---


class Lent(_Message):
    """A region's descriptor, what it is made of, and whether its transport needs an exchange."""

    descriptor: bytes
    info: dict[str, str]


class Welcome(_Message):
    """An owner's answer to a hello; in the other direction the answer to an `Exchange`."""

    welcome: bytes = b""
    error: str = ""


class Opened(_Message):
    """Ready to prepare points.

    Attributes:
        info: what the transport is made of.
    """

    info: dict[str, str]


class Ready(_Message):
    """A point can be run.

    Attributes:
        data_path: how bytes travel, in words. one_sided: as in `transport.Capabilities`; None where nothing travels.
        mapped: memcpy copies from the very memory that is lent.
        limits: what can be run beside the operation.
    """

    data_path: str
    one_sided: bool | None
    mapped: bool
    limits: list[str]


class Ran(_Message):
    """What was done in a window.

    Attributes:
        ops, blocks: how many. size_bytes: payload; 0 for requests.
        busy_ns: time in operations; what is done between them does not count.
        counts, least_ns, most_ns: a `histogram.Histogram` of the operations' durations.
    """

    ops: int
    blocks: int
    size_bytes: int
    busy_ns: int
    counts: list[tuple[int, int]]
    least_ns: int
    most_ns: int


class Done(_Message):
    """Nothing to tell."""


class Failed(_Message):
    """A command was not carried out.

    Attributes:
        kind: class of the error. message: in words.
    """

    kind: str
    message: str


class Exchange(_Message):
    """A client's hello for the owner; the sweep answers with a `Welcome`."""

    hello: bytes
    identity: bytes
    deadline_ns: int


Command: TypeAlias = Lend | Accept | OpenRegion | OpenPool | Prepare | Run | Finish | Welcome
Answer: TypeAlias = Lent | Welcome | Opened | Ready | Ran | Done | Failed | Exchange
