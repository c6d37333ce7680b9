"""The blocking client."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from memfabric.client import leases, listing, reading, registered, writing
from memfabric.client.buffers import Keys, chained_keys, distinct_keys, key_array, new_output, resolve, token_column
from memfabric.client.effects import Operation, run
from memfabric.client.engine import Engine
from memfabric.client.handles import ReadLease, WriteLease
from memfabric.client.listing import BlockPage
from memfabric.client.options import open_engine
from memfabric.client.quick import Quick
from memfabric.client.registered import Registration
from memfabric.client.results import GetResult, PinResult, PrefetchResult, PutResult, RemoveResult
from memfabric.core.fingerprint import Fingerprint
from memfabric.core.keys import ROOT, BlockKeys, block_keys
from memfabric.core.messages import NamespaceSpec
from memfabric.errors import UsageError

T = TypeVar("T")


def connect(
    address: str | None = None,
    *,
    namespace: str,
    fingerprint: Fingerprint | None = None,
    create: NamespaceSpec | None = None,
    timeout_s: float = 5.0,
    verify: bool = True,
    copy_threads: int = 0,
    name: str | None = None,
    shm_directory: str | None = None,
    transport: str | Sequence[str] | None = None,
    transport_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Client:
    """Open a namespace of a pool.

    Args:
        address: the metadata server, ``tcp://HOST:PORT``; None: ``$MEMFABRIC_ADDRESS``, else
            ``tcp://127.0.0.1:7170``.
        namespace: its name. It must exist, unless `create` is given.
        fingerprint: what the caller's KV is; None takes the namespace's own on trust.
        create: create the namespace like this if it is not there; if it is, fingerprint and block shape must
            agree.
        timeout_s: deadline of this call, and the default for the client's calls, in seconds.
        verify: check the payload's digests on every read; headers are checked in any case.
        copy_threads: native threads per copy: 0 as many as pay, 1 the calling thread alone.
        name: how the server's status and log call this client; None: program and process id.
        shm_directory: where nodes on this host keep their regions; None: ``$MEMFABRIC_SHM_DIRECTORY``, else
            ``/dev/shm``.
        transport: by which nodes may be reached: ``"auto"`` (the best that reaches each node: shared memory, RDMA, then
            what UCX finds), one name, or several, best first; None: ``$MEMFABRIC_TRANSPORT``, else auto. It is chosen
            once for each node; `Client.stats` says what and why.
        transport_options: keyword arguments for the transports, by name: ``{"ucx": {"tls": "tcp"}}``.

    Raises:
        UnavailableError: no server answered in time. RefusedError: it said no (unknown namespace, another
            fingerprint with the fields that differ, another protocol version). UsageError: the arguments are
            wrong. Not applied, except that a namespace may have been created when no answer came.
    """
    return Client(
        open_engine(
            address,
            namespace,
            fingerprint,
            create,
            timeout_s,
            verify,
            copy_threads,
            name,
            shm_directory,
            transport,
            transport_options,
        )
    )


def make_keys(engine: Engine, token_ids: Sequence[int] | npt.NDArray[Any], parent: bytes | None) -> BlockKeys:
    """Keys of a prompt's whole blocks in the client's namespace."""
    spec = engine.namespace
    try:
        return block_keys(spec.fingerprint.digest(), token_ids, spec.block_tokens, ROOT if parent is None else parent)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def describe(kind: str, engine: Engine) -> str:
    """A client in one line."""
    spec = engine.namespace
    life = "closed" if engine.closed else f"epoch {engine.link.epoch}"
    return f"<{kind} of {spec.name!r} at {engine.link.address}: blocks of {spec.block_bytes} bytes, {life}>"


class Client:
    """A namespace of the pool. Thread-safe, except that one lease is used by one thread at a time. A context
    manager.

    Buffers that are passed belong to the call until it returns. Keys are `BlockKeys`, a sequence of 16-byte
    ``bytes``, or a uint8 array ``[n, 16]`` (raw keys are a chain in order). An empty batch is legal and asks
    nobody. Batches of any size work; they are sent in parts. A client does not survive ``fork``: connect in
    the child.

    Errors of every call: `UsageError` (not applied), `RefusedError` (not applied), `UnavailableError` (reads,
    or not applied), `OutcomeUnknownError` (unknown; says how to find out).
    """

    def __init__(self, engine: Engine) -> None:
        """Use `connect`."""
        self._engine = engine
        self._quick = Quick(engine)
        # A client that is dropped, or still open when the interpreter ends, is closed then.
        self._closer = weakref.finalize(self, engine.close)

    @property
    def namespace(self) -> NamespaceSpec:
        """What the namespace is: name, block_bytes, block_tokens, segments, fingerprint, policy, …"""
        return self._engine.namespace

    def block_keys(self, token_ids: Sequence[int] | npt.NDArray[Any], parent: bytes | None = None) -> BlockKeys:
        """Keys of the whole blocks of a token sequence; a tail shorter than a block gets none.

        Args:
            token_ids: ids in ``[0, 2**32)``.
            parent: the key of the block before ``token_ids[0]``; None at the start of a prompt.
        """
        return make_keys(self._engine, token_ids, parent)

    def match(self, keys: Keys, *, timeout_s: float | None = None) -> int:
        """Longest cached prefix of `keys`, in blocks. The blocks may be evicted right after; `acquire` holds
        them."""
        return self._run(lambda e: reading.match(e, key_array(keys), e.deadline_ns(timeout_s)))

    def get(self, keys: Keys, out: Any = None, *, leased: bool = False, timeout_s: float | None = None) -> GetResult:
        """Read blocks. Blocks whose place is known are read without a request; the rest is leased, read and
        released.

        Args:
            keys: n keys; the same key may be there twice.
            out: where to: one C-contiguous array, tensor or buffer of ``n × block_bytes``, of the host or of a GPU; a
                list of n of block_bytes each; or `PagedBlocks`. None: a fresh uint8 array ``[n, block_bytes]``.
            leased: do not rely on known places; take a lease for every block.

        Returns:
            A status per key. `out` holds exactly the committed bytes where it is OK and is undefined
            elsewhere.
        """
        engine = self._engine
        engine.check_open()
        array = key_array(keys)
        if out is None:
            out = new_output(len(array), engine.shape, engine.shape.segments)
        deadline_ns = engine.deadline_ns(timeout_s)
        if not leased and isinstance(out, np.ndarray):  # other buffers could be resized under a quick read
            status = self._quick.get(array, out, deadline_ns)
            if status is not None:
                return GetResult(status, out, len(array) * engine.shape.block_bytes, len(array))
        memory = resolve(out, len(array), engine.shape, writable=True)
        return run(reading.get(engine, array, memory, out, leased, deadline_ns), engine.link)

    def put(
        self,
        keys: Keys,
        blocks: Any,
        *,
        token_counts: Sequence[int] | npt.NDArray[Any] | None = None,
        wait: bool = False,
        timeout_s: float | None = None,
    ) -> PutResult:
        """Store blocks. What is there already is not written again.

        Args:
            keys: n distinct keys; with `BlockKeys` their parents are stored too, raw keys are a chain in
                order.
            blocks: the n blocks; see `get`'s `out`.
            token_counts: tokens per block, 1 to block_tokens; None: whole blocks. Fewer only where the
                namespace takes them.
            wait: retry blocks without space and await other writers, until `timeout_s`.

        Returns:
            A status per key. After an `OutcomeUnknownError` it is safe to put again.
        """
        engine = self._engine
        engine.check_open()
        chain = chained_keys(keys)
        distinct_keys(chain.keys)
        tokens = token_column(token_counts, len(chain), engine.namespace.block_tokens)
        memory = resolve(blocks, len(chain), engine.shape, writable=False)
        return run(writing.put(engine, chain, memory, tokens, wait, engine.deadline_ns(timeout_s)), engine.link)

    def acquire(
        self, keys: Keys, *, ttl_s: float | None = None, prefix: bool = False, timeout_s: float | None = None
    ) -> ReadLease:
        """Hold blocks for reading; a context manager that releases.

        Args:
            ttl_s: how long at most; None: 10 s. The server may grant less.
            prefix: hold only the leading blocks up to the first that is missing.
        """
        held = self._run(lambda e: leases.hold_read(e, key_array(keys), ttl_s, prefix, e.deadline_ns(timeout_s)))
        return ReadLease(held)

    def reserve(
        self,
        keys: Keys,
        *,
        token_counts: Sequence[int] | npt.NDArray[Any] | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
    ) -> WriteLease:
        """Hold fresh blocks for writing; a context manager that aborts unless `WriteLease.commit` was called.

        Args:
            keys, token_counts: see `put`.
            ttl_s: how long at most; None: 10 s.
        """
        self._engine.check_open()
        chain = chained_keys(keys)
        distinct_keys(chain.keys)
        tokens = token_column(token_counts, len(chain), self._engine.namespace.block_tokens)
        held = self._run(lambda e: leases.hold_write(e, chain, tokens, ttl_s, e.deadline_ns(timeout_s)))
        return WriteLease(held)

    def remove(self, keys: Keys, *, timeout_s: float | None = None) -> RemoveResult:
        """Forget blocks. Those under a lease can no longer be found, and are freed when the lease ends."""
        array = key_array(keys)
        distinct_keys(array)
        return self._run(lambda e: reading.remove(e, array, e.deadline_ns(timeout_s)))

    def pin(self, keys: Keys, *, timeout_s: float | None = None) -> PinResult:
        """Keep blocks from being evicted or expiring until `unpin` or `remove`, whatever becomes of this client.

        For what every request needs, such as a shared system prompt: pin its whole chain. Pinned blocks count
        against the quota, and a namespace full of them takes nothing more.
        """
        return self._run(lambda e: reading.pin(e, key_array(keys), True, e.deadline_ns(timeout_s)))

    def unpin(self, keys: Keys, *, timeout_s: float | None = None) -> PinResult:
        """Let blocks be evicted again."""
        return self._run(lambda e: reading.pin(e, key_array(keys), False, e.deadline_ns(timeout_s)))

    def prefetch(self, keys: Keys, *, timeout_s: float | None = None) -> PrefetchResult:
        """Learn the places of blocks now, so that the next `get` of them needs no request."""
        return self._run(lambda e: reading.prefetch(e, key_array(keys), e.deadline_ns(timeout_s)))

    def register(self, memory: Any) -> Registration:
        """Register local memory once, so that RDMA goes straight to and from it instead of through a staging buffer.

        For buffers that many calls use, such as an engine's KV cache. It is advice: where memory cannot be registered
        (a limit of locked memory), or a transport has no use for it, calls work as before; `stats` counts what was
        staged and what could not be registered, the log says why.

        Args:
            memory: a writable array, CPU tensor or buffer, or a list of such; strides do not matter.

        Returns:
            What ends it: a context manager with `close`. It keeps the memory alive.

        Raises:
            UsageError: read-only, empty, no plain host memory, or the client is closed. Nothing is registered then.
        """
        return self._run(lambda e: registered.register(e, memory))

    def explain(self, key: bytes | str, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Everything the server knows about a key (16 bytes, or 32 hexadecimal digits)."""
        return self._run(lambda e: listing.explain(e, key, e.deadline_ns(timeout_s)))

    def list_blocks(self, *, page: int = 1000, timeout_s: float | None = None) -> Iterator[BlockPage]:
        """Readable blocks in pages of columns. Blocks that come or go meanwhile may be in it or not."""
        cursor: int | None = 0
        while cursor is not None:
            at = cursor
            found, cursor = self._run(lambda e, at=at: listing.page(e, at, page, e.deadline_ns(timeout_s)))  # type: ignore[misc]
            yield found

    def stats(self) -> dict[str, Any]:
        """This client's counters, and what it knows."""
        return self._engine.stats()

    def close(self) -> None:
        """Give leases back, end the I/O thread, unmap. Idempotent; takes about a second at most."""
        self._closer.detach()
        self._engine.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return describe("Client", self._engine)

    def _run(self, make: Callable[[Engine], Operation[T]]) -> T:
        self._engine.check_open()
        return run(make(self._engine), self._engine.link)
