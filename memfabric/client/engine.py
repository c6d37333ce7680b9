"""What all operations of one client share: link, regions, known places, counters, limits.

Responsible for the client's life (attached, closed, forked) and for keeping what is known in step with what
the server pushes. It knows no operation; those are in `reading`, `writing` and `leases`.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections import Counter
from typing import Any, TypeVar

import numpy as np

from memfabric.client.calls import Answer
from memfabric.client.effects import Operation, Rpc
from memfabric.client.gpu import Gpu
from memfabric.client.link import open_link
from memfabric.client.memory import BlockShape
from memfabric.client.places import DEFAULT_CAPACITY, Places
from memfabric.client.regions import Regions
from memfabric.core import layout
from memfabric.core.keys import KEY_BYTES
from memfabric.core.messages import (
    MAX_KEYS_PER_REQUEST,
    Abort,
    Attach,
    Attached,
    Body,
    Introduce,
    Introduced,
    NamespaceSpec,
    RegionView,
    Release,
    View,
)
from memfabric.errors import MemfabricError, UnavailableError, UsageError
from transport.auto import AutoTransport
from transport.errors import TimedOutError, UnreachableError

DEFAULT_LEASE_NS = 10_000_000_000

R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a client works.

    Attributes:
        verify: check payload digests on every read. Headers are always checked.
        copy_threads: native threads per copy; 0 chooses, 1 is the calling thread alone.
        timeout_ns: default deadline of a call.
        places: how many known places to keep.
    """

    verify: bool = True
    copy_threads: int = 0
    timeout_ns: int = 5_000_000_000
    places: int = DEFAULT_CAPACITY


class Engine:
    """State of one client of one namespace. Thread-safe."""

    def __init__(self, address: str, attach: Attach, transport: AutoTransport, settings: Settings) -> None:
        """Attach; when this returns, the client works.

        Raises:
            UnavailableError, RefusedError, UsageError: see `link.open_link`.
        """
        self.settings = settings
        self.transport = transport
        self.gpu = Gpu(transport)
        self.counters: Counter[str] = Counter()
        self._count_lock = threading.Lock()
        self.leases: dict[int, bool] = {}
        """Live leases by id; True: a write lease."""
        self._pid = os.getpid()
        self.namespace_name = attach.namespace
        self.closed = False
        self.shape = BlockShape(1, 1)
        self.regions = Regions(transport, self.shape, self._introduce)
        self.places = Places(1)
        self._joined = False
        self.max_lease_ns = DEFAULT_LEASE_NS
        self.max_keys = MAX_KEYS_PER_REQUEST
        self.link, attached = open_link(address, attach, self, settings.timeout_ns / 1e9)
        assert attached.namespace is not None, "attached to a namespace"
        self.namespace: NamespaceSpec = attached.namespace.spec

    # --- what the link tells (its thread) ---

    def on_joined(self, attached: Attached, epoch: int) -> None:
        """A session is open; the first one says what the namespace is."""
        if not self._joined and attached.namespace is not None:
            spec = attached.namespace.spec
            self.shape = BlockShape(spec.block_bytes, spec.segments)
            self.header_stride = layout.header_stride(spec.segments)
            self.header_bytes = layout.HEADER_BASE_BYTES + 8 * (spec.segments - 1)
            self.regions = Regions(self.transport, self.shape, self._introduce)
            self.places = Places(self.settings.places)
            self._joined = True
        self.max_lease_ns = max(1, attached.max_lease_ns)
        self.max_keys = min(max(1, attached.max_keys), MAX_KEYS_PER_REQUEST)
        self.leases.clear()
        if attached.view is not None:
            self._apply(attached.view, joined=True)

    def on_view(self, view: View) -> None:
        """Membership changed."""
        if self._joined and view.namespace == self.namespace_name:
            self._apply(view, joined=False)

    def on_removed(self, keys: bytes) -> None:
        """Blocks that can no longer be found: do not read them from memory either."""
        if self._joined and len(keys) % KEY_BYTES == 0:
            self.places.forget(np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES))

    def take_touched(self) -> bytes:
        """Reuse to report."""
        return self.places.take_touched()

    def _apply(self, view: View, *, joined: bool) -> None:
        gone = self.regions.apply(view, joined=joined)
        if gone is not None:
            self.places.forget_regions(gone)

    def _introduce(self, region: RegionView, hello: bytes, deadline_ns: int) -> bytes:
        """As `regions.Introduce`. In threads that may wait, never in the link's own."""
        body = Introduce(
            node=region.node, incarnation=region.incarnation, identity=self.transport.identity, hello=hello
        )
        try:
            future = self.link.submit(body, deadline_ns)
        except UsageError as error:
            raise UnreachableError(str(error)) from error
        try:
            answer = future.result().body
        except UnavailableError as error:
            raise TimedOutError(str(error)) from error
        except MemfabricError as error:
            raise UnreachableError(str(error)) from error
        except BaseException:
            self.link.discard(future)
            raise
        if not isinstance(answer, Introduced):
            raise UnreachableError(f"the server answered an introduction with {type(answer).__name__}")
        return answer.welcome

    # --- for operations ---

    def check_open(self) -> None:
        """Refuse work on a client that cannot do any.

        Raises:
            UsageError: closed, or copied into another process by fork.
        """
        if os.getpid() != self._pid:
            raise UsageError("this client belongs to the parent process; connect again after a fork")
        if self.closed:
            raise UsageError("this client is closed; connect again")

    def deadline_ns(self, timeout_s: float | None) -> int:
        """The instant (CLOCK_MONOTONIC) by which a call with this timeout ends; None is the client's default.

        Raises:
            UsageError: not above 0.
        """
        if timeout_s is None:
            return time.monotonic_ns() + self.settings.timeout_ns
        if not timeout_s > 0:
            raise UsageError(f"timeout_s must be above 0, got {timeout_s}")
        return time.monotonic_ns() + int(min(timeout_s, 1e9) * 1e9)

    def lease_ns(self, ttl_s: float | None) -> int:
        """A lease's time to live, within what the server grants.

        Raises:
            UsageError: not above 0.
        """
        if ttl_s is None:
            return min(DEFAULT_LEASE_NS, self.max_lease_ns)
        if not ttl_s > 0:
            raise UsageError(f"ttl_s must be above 0, got {ttl_s}")
        return max(1, min(int(min(ttl_s, 1e9) * 1e9), self.max_lease_ns))

    def call(self, body: Body, expected: type[R], deadline_ns: int) -> Operation[tuple[R, Answer]]:
        """Ask the server; the answer must be of the expected type.

        Raises:
            RefusedError, UnavailableError, OutcomeUnknownError: see `link.Link.submit`.
        """
        answer: Answer = yield Rpc(body, deadline_ns)
        if not isinstance(answer.body, expected):
            raise MemfabricError(
                f"the server answered {type(body).__name__} with {type(answer.body).__name__}; is it another release?"
            )
        return answer.body, answer

    def count(self, **what: int) -> None:
        """Add to counters."""
        with self._count_lock:
            for name, value in what.items():
                self.counters[name] += value

    def hold(self, lease: int, *, writing: bool) -> None:
        """Note a lease, so that `close` gives it back."""
        self.leases[lease] = writing

    def forget_lease(self, lease: int) -> None:
        """The lease has ended."""
        self.leases.pop(lease, None)

    def give_back(self, lease: int, *, writing: bool, flushed: bool = True) -> None:
        """End a lease without waiting for the answer.

        Args:
            flushed: of a write lease: nothing of it is being written any more, nor may still arrive.
        """
        self.forget_lease(lease)
        body: Body = Abort(lease=lease, flushed=flushed) if writing else Release(leases=[lease])
        self.link.post(body, time.monotonic_ns() + self.settings.timeout_ns)

    def stats(self) -> dict[str, Any]:
        """Counters since the start and what is known now."""
        with self._count_lock:
            counters = Counter(self.counters)
        table = self.places.table
        counters["gets"] += table.quick_gets
        for name in ("get_blocks", "optimistic_blocks"):
            counters[name] += table.quick_blocks
        counters["get_bytes"] += table.quick_blocks * self.shape.block_bytes
        return {
            "namespace": self.namespace_name,
            "address": self.link.address,
            "epoch": self.link.epoch,
            "transport": ", ".join(dict.fromkeys(c.transport for c in self.transport.choices())) or "not chosen yet",
            "paths": [
                {
                    "node": self.regions.node_of(choice.owner),
                    "transport": choice.transport,
                    "data_path": choice.data_path,
                    "instead_of": choice.instead_of,
                }
                for choice in self.transport.choices()
            ],
            **self.transport.stats(),
            **self.gpu.stats(),
            "known_places": len(self.places),
            "regions": len(self.regions),
            "view_version": self.regions.version[1],
            "leases": len(self.leases),
            **dict.fromkeys(COUNTERS, 0),
            **counters,
            **self.link.counts(),
        }

    def close(self) -> None:
        """Give leases back, end the thread, unmap. Idempotent, bounded, and nothing in a forked child."""
        if self.closed or os.getpid() != self._pid:
            return
        self.closed = True
        self.regions.close()  # waits for running copies: from here on nothing is written under our leases
        self.gpu.close()
        self.transport.close()
        self.leases.clear()
        self.link.detach()
        self.link.close()


COUNTERS = (
    "gets",
    "get_blocks",
    "get_bytes",
    "optimistic_blocks",
    "leased_blocks",
    "stale_places",
    "missing_blocks",
    "corrupt_blocks",
    "unreachable_blocks",
    "verification_retries",
    "puts",
    "put_blocks",
    "put_bytes",
    "existing_blocks",
    "refused_blocks",
    "lost_blocks",
    "matches",
)
"""Counters of `Engine.stats` that are there from the start."""
