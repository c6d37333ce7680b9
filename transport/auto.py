"""One transport in front of several: for every owner the best that reaches it, chosen once.

An owner that lends its regions over several transports hands out *combined* descriptors: its own name and, for each
transport, that one's descriptor. The first time a client meets an owner it tries them in order of preference, keeps
the first that works, and remembers why the ones before did not. From then on that owner is reached by that transport
or not at all: a choice that failed is an error, not a reason to use another silently.

Invariants:
- A batch is checked whole before any part of it goes to any transport.
- While all handles belong to one transport, batches go to it untouched.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import msgspec
import numpy as np

from transport import _digests, base, registry
from transport.base import Batch, Capabilities, Exchange, Pending, Region, Transport, UInt8Column
from transport.errors import (
    DescriptorError,
    NotConnectedError,
    TransportError,
    UnreachableError,
    UnsupportedError,
)

PREFERENCE = ("shm", "verbs", "ucx")
"""Memory of this host, then remote memory access, then what UCX finds. Others come after these, by name."""
MAX_PARTS = 8
OWNER_BYTES = 16
MAX_COMBINED_BYTES = 256 + MAX_PARTS * (base.MAX_DESCRIPTOR_BYTES + 64)
_VERSION = 1
_NONE = np.int32(-1)


class _Combined(msgspec.Struct, frozen=True, array_like=True):
    kind: str
    version: int
    owner: bytes
    parts: Annotated[list[tuple[str, bytes]], msgspec.Meta(min_length=1, max_length=MAX_PARTS)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Combined)
_hello_decoder = msgspec.msgpack.Decoder(tuple[str, bytes])


def combine(owner: bytes, parts: Iterable[tuple[str, bytes]]) -> bytes:
    """A combined descriptor.

    Args:
        owner: 16 bytes, the same for all regions of one life of one owner.
        parts: Name of a transport and its descriptor, each transport once.
    """
    return _encoder.encode(_Combined("combined", _VERSION, owner, list(parts)))


def take_apart(descriptor: bytes) -> tuple[bytes, dict[str, bytes]]:
    """What `combine` put together. Anything may be in it.

    Raises:
        DescriptorError: It is no combined descriptor.
    """
    try:
        if len(descriptor) > MAX_COMBINED_BYTES:
            raise DescriptorError(f"a descriptor of {len(descriptor)} bytes is too long")
        told = _decoder.decode(descriptor)
    except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, RecursionError) as error:
        raise DescriptorError(f"not a combined descriptor: {error}") from error
    if told.kind != "combined" or told.version != _VERSION:
        raise DescriptorError(f"a descriptor {told.kind[:32]!r} of version {told.version}, not combined, {_VERSION}")
    if len(told.owner) != OWNER_BYTES or any(len(part) > base.MAX_DESCRIPTOR_BYTES for _, part in told.parts):
        raise DescriptorError("a combined descriptor with an owner or a part of the wrong size")
    return told.owner, dict(told.parts)


def address_hello(transport: str, hello: bytes) -> bytes:
    """A hello that says which of an owner's transports it is for."""
    return msgspec.msgpack.encode((transport, hello))


def read_hello(addressed: bytes) -> tuple[str, bytes]:
    """What `address_hello` put together: the transport's name and its hello. Anything may be in it.

    Raises:
        DescriptorError: It is nothing of the kind.
    """
    try:
        return _hello_decoder.decode(addressed)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DescriptorError(f"not a hello: {error}") from error


@dataclasses.dataclass(frozen=True)
class Choice:
    """How an owner is reached.

    Attributes:
        owner: Its 16 bytes.
        transport: Name. data_path: In words.
        instead_of: Why those that are preferred were not taken, by name.
    """

    owner: bytes
    transport: str
    data_path: str
    instead_of: dict[str, str]


class AutoTransport(Transport):
    """See the module. For clients: it lends nothing.

    Args:
        allowed: Names of the transports that may be used, best first; None: every one that can be used here.
        options: Keyword arguments for each transport, by name.
        on_choice: Called once for each owner, in the thread that connected.

    Raises:
        UnsupportedError: A transport that was named can't be used here; the message says why.
    """

    def __init__(
        self,
        allowed: Iterable[str] | None = None,
        options: dict[str, dict[str, Any]] | None = None,
        on_choice: Callable[[Choice], None] | None = None,
    ) -> None:
        super().__init__()
        self._options = options or {}
        self._on_choice = on_choice
        self._explicit = allowed is not None
        known = [name for name in PREFERENCE if name in registry.names()]
        known += [name for name in registry.names() if name not in known]
        self._allowed = list(known if allowed is None else dict.fromkeys(allowed))
        self._made: dict[str, Transport] = {}
        self._prepared: list[tuple[int, int]] = []
        self._unusable: dict[str, str] = {}
        self._choices: dict[bytes, Choice] = {}
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        # By handle: number of the transport in `_order` (-1: free), its handle, bytes, writable.
        self._table = np.full((0, 4), -1, np.int64)
        self._order: list[Transport] = []
        self._only: Transport | None = None
        self._closed = False
        if self._explicit:
            for name in self._allowed:
                self._get(name)

    def _get(self, name: str) -> Transport:
        """The transport of that name, made when it is first needed.

        Raises:
            UnsupportedError: It can't be used here. Said once, remembered after that.
        """
        if name in self._unusable:
            raise UnsupportedError(self._unusable[name])
        if name not in self._made:
            try:
                made = registry.create(name, **self._options.get(name, {}))
            except (UnsupportedError, OSError) as error:
                self._unusable[name] = str(error)
                raise UnsupportedError(str(error)) from error
            made.identity = self.identity  # owners know this client by one name, whatever the transport
            with self._lock:
                self._made[name] = made
                self._order.append(made)
                prepared = list(self._prepared)
            for address, length in prepared:
                made.prepare(address, length)
        return self._made[name]

    @property
    def capabilities(self) -> Capabilities:
        """Of the transport in use while there is one; else what holds for all that are in use."""
        if self._only is not None:
            return self._only.capabilities
        used = [each.capabilities for each in self._order]
        if len(used) == 1:
            return used[0]
        return Capabilities(
            name="auto",
            one_sided=bool(used) and all(each.one_sided for each in used),
            data_path="; ".join(dict.fromkeys(each.data_path for each in used)) or "not chosen yet",
            hosts=True,
            inline_digest=bool(used) and all(each.inline_digest for each in used),
            ordered=False,
            zero_copy=False,
            fences=frozenset(),
            detects=frozenset.intersection(*(each.detects for each in used)) if used else frozenset(),
            kinds=frozenset({"cpu"}),
            region_kinds=frozenset(),
            needs_exchange=any(each.needs_exchange for each in used),
            max_region_bytes=min((each.max_region_bytes for each in used), default=1 << 46),
            max_operation_bytes=min((each.max_operation_bytes for each in used), default=1 << 46),
        )

    def choices(self) -> list[Choice]:
        """How each owner that was met is reached, and why."""
        return list(self._choices.values())

    def create_region(self, name: str, region_id: int, size_bytes: int, **_options: Any) -> Region:
        raise UnsupportedError("auto lends nothing; make the transport that shall")

    # --- connections ---

    def connect(
        self, descriptor: bytes, *, writable: bool, exchange: Exchange | None = None, deadline_ns: int = 0
    ) -> int:
        owner, parts = take_apart(descriptor)
        transport, sub = self._reach(owner, parts, writable, exchange, deadline_ns)
        size = int(transport.size_of(sub))
        with self._lock:
            if self._closed:
                transport.disconnect(sub)
                raise TransportError("this transport is closed")
            return self._number(transport, sub, size, writable)

    def _reach(
        self, owner: bytes, parts: dict[str, bytes], writable: bool, exchange: Exchange | None, deadline_ns: int
    ) -> tuple[Transport, int]:
        chosen = self._choices.get(owner)
        if chosen is not None:
            return self._join(chosen.transport, parts, writable, exchange, deadline_ns)
        with self._connecting:  # one choice for an owner, whoever connects
            chosen = self._choices.get(owner)
            if chosen is None:
                return self._choose(owner, parts, writable, exchange, deadline_ns)
        return self._join(chosen.transport, parts, writable, exchange, deadline_ns)

    def _join(
        self, name: str, parts: dict[str, bytes], writable: bool, exchange: Exchange | None, deadline_ns: int
    ) -> tuple[Transport, int]:
        if name not in parts:
            raise UnreachableError(f"this region is not lent over {name}, by which its owner is reached")
        transport = self._get(name)
        if exchange is not None:
            carry = exchange
            exchange = lambda hello, end_ns: carry(address_hello(name, hello), end_ns)  # noqa: E731
        return transport, transport.connect(parts[name], writable=writable, exchange=exchange, deadline_ns=deadline_ns)

    def _choose(
        self, owner: bytes, parts: dict[str, bytes], writable: bool, exchange: Exchange | None, deadline_ns: int
    ) -> tuple[Transport, int]:
        against: dict[str, str] = {}
        for name in self._allowed:
            if name not in parts:
                against[name] = "the owner does not lend over it"
                continue
            try:
                found = self._join(name, parts, writable, exchange, deadline_ns)
            except (UnreachableError, UnsupportedError) as error:
                against[name] = str(error)
                if deadline_ns and time.monotonic_ns() >= deadline_ns:
                    break
                continue
            choice = Choice(owner, name, found[0].capabilities.data_path, against)
            self._choices[owner] = choice
            if self._on_choice is not None:
                self._on_choice(choice)
            return found
        told = "; ".join(f"{name}: {why}" for name, why in against.items())
        raise UnreachableError(f"no transport reaches this owner ({told}); it lends over {', '.join(parts)}")

    def _number(self, transport: Transport, sub: int, size: int, writable: bool) -> int:
        """A handle: the transport's own where it is alone and the number is free, else the smallest free one."""
        table = self._table
        which = self._order.index(transport)
        used = np.unique(table[table[:, 0] >= 0, 0])
        alone = len(used) == 0 or (len(used) == 1 and used[0] == which and self._only is transport)
        if alone and (sub >= len(table) or table[sub, 0] < 0):
            handle, self._only = sub, transport
        else:
            free = np.nonzero(table[:, 0] < 0)[0]
            handle, self._only = int(free[0]) if len(free) else len(table), None
        grown = np.full((max(len(table), handle + 1), 4), -1, np.int64)
        grown[: len(table)] = table
        grown[handle] = (which, sub, size, writable)
        self._table = grown  # replaced, never changed: batches read it without the lock
        return handle

    def disconnect(self, handle: int) -> None:
        with self._lock:
            transport, sub = self._split_handle(handle)
            table = self._table.copy()
            table[handle] = -1
            self._table = table
        transport.disconnect(sub)

    def _split_handle(self, handle: int) -> tuple[Transport, int]:
        table = self._table
        if not 0 <= handle < len(table) or table[handle, 0] < 0:
            raise NotConnectedError(f"handle {handle} is not connected")
        return self._order[int(table[handle, 0])], int(table[handle, 1])

    def size_of(self, handle: int) -> int:
        table = self._table
        return int(table[handle, 2]) if 0 <= handle < len(table) and table[handle, 0] >= 0 else 0

    def zero_copy(self, handle: int) -> bool:
        """Whether `mapped` works for this handle."""
        return self._split_handle(handle)[0].capabilities.zero_copy

    def mapped(self, handle: int) -> UInt8Column:
        transport, sub = self._split_handle(handle)
        return transport.mapped(sub)

    def prefault(self, handle: int) -> None:
        """As `ShmTransport.prefault`, where the handle is in shared memory; nothing elsewhere."""
        transport, sub = self._split_handle(handle)
        enter = getattr(transport, "prefault", None)
        if enter is not None:
            enter(sub)

    def prepare(self, address: int, length: int) -> None:
        with self._lock:
            self._prepared.append((address, length))  # also for transports that are made later
            made = list(self._order)
        for transport in made:
            transport.prepare(address, length)

    def forget(self, address: int, length: int) -> None:
        with self._lock:
            if (address, length) in self._prepared:
                self._prepared.remove((address, length))
            made = [] if (address, length) in self._prepared else list(self._order)  # somebody else's advice stands
        for transport in made:
            transport.forget(address, length)

    # --- batches ---

    def read(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> int:
        only = self._only
        if only is not None:
            return only.read(batch, deadline_ns, threads)
        return self._post(False, batch, deadline_ns, threads).wait()

    def write(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> int:
        only = self._only
        if only is not None:
            return only.write(batch, deadline_ns, threads)
        return self._post(True, batch, deadline_ns, threads).wait()

    def post_read(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> Pending:
        only = self._only
        return only.post_read(batch, deadline_ns, threads) if only else self._post(False, batch, deadline_ns, threads)

    def post_write(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> Pending:
        only = self._only
        return only.post_write(batch, deadline_ns, threads) if only else self._post(True, batch, deadline_ns, threads)

    def _post(self, write: bool, batch: Batch, deadline_ns: int, threads: int) -> Pending:
        table = self._table
        self._check(table, write, batch)
        which = table[batch.region, 0] if len(batch) else np.zeros(0, np.int64)
        parts = []
        # Those that copy in the calling thread last: the others work meanwhile.
        for number in sorted(np.unique(which).tolist(), key=lambda n: self._order[n].capabilities.zero_copy):
            at = np.nonzero(which == number)[0]
            part = Batch(
                batch.local[at],
                table[batch.region[at], 1].astype(np.int32),
                batch.offset[at],
                batch.length[at],
                kind=batch.kind,
            )
            transport = self._order[number]
            call = transport.post_write if write else transport.post_read
            try:
                parts.append((at, part, call(part, deadline_ns, threads)))
            except TransportError as error:  # its handles went away since the check: nothing of this part was done
                part.error = error
                part.status[:] = base.NOT_DONE
                parts.append((at, part, base.Finished(0)))
        return _Parts(batch, parts)

    def _check(self, table: Any, write: bool, batch: Batch) -> None:
        n = len(batch)
        for name, kind in (("local", "u8"), ("region", "i4"), ("offset", "u8"), ("length", "u8"), ("status", "u1")):
            column = getattr(batch, name)
            if column.dtype != np.dtype(kind) or column.shape != (n,):
                raise ValueError(f"column {name} must be a one-dimensional array of {n} {np.dtype(kind)}")
        _digests.check_groups(batch)
        status = np.full(n, base.NOT_DONE, np.uint8)
        handles = batch.region.astype(np.int64)
        known = (handles >= 0) & (handles < len(table))
        row = table[np.where(known, handles, 0)] if len(table) else np.full((n, 4), -1, np.int64)
        known &= row[:, 0] >= 0
        size = np.where(known, row[:, 2], 0).astype(np.uint64)
        fits = (batch.length <= size) & (batch.offset <= size - np.minimum(batch.length, size))
        fits &= (batch.length == 0) | ((batch.local != 0) & (batch.local <= ~batch.length))
        status[~fits] = base.OUT_OF_BOUNDS
        if write:
            status[known & (row[:, 3] != 1)] = base.NOT_WRITABLE
        status[~known] = base.REGION_GONE
        bad = status != base.NOT_DONE
        if bad.any():
            batch.status[:] = status
            raise base.refusal("write" if write else "read", batch, int(status[bad.argmax()]), self.size_of)

    def flush(self, deadline_ns: int = 0) -> bool:
        return all(transport.flush(deadline_ns) for transport in self._order)

    def stats(self) -> dict[str, int | str]:
        """Those of the transports, each with its name in front."""
        found: dict[str, int | str] = {}
        for name, transport in self._made.items():
            found.update({f"{name}.{key}": value for key, value in transport.stats().items()})
        return found

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._table = np.full((0, 4), -1, np.int64)
        for transport in self._order:
            transport.close()


class _Parts(Pending):
    """A batch whose parts are with several transports."""

    def __init__(self, batch: Batch, parts: list[tuple[Any, Batch, Pending]]) -> None:
        self._batch, self._parts = batch, parts
        self._done: int | None = None

    def poll(self) -> bool:
        if self._done is None:
            ended = [pending.poll() for _, _, pending in self._parts]  # every one makes progress
            if all(ended):
                self._gather()
        return self._done is not None

    def wait(self) -> int:
        if self._done is None:
            for _, _, pending in reversed(self._parts):
                pending.wait()
            self._gather()
        return self._done or 0

    def abandon(self) -> int:
        if self._done is None:
            for _, _, pending in self._parts:
                pending.abandon()
            self._gather()
        return self._done or 0

    def _gather(self) -> None:
        batch = self._batch
        batch.error = None
        for at, part, _ in self._parts:
            batch.status[at] = part.status
            batch.error = batch.error or part.error
        _digests.fill(batch)
        self._done = int((batch.status == base.DONE).sum())
