"""The administrator's client: the pool as a whole, without a namespace of its own."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Any, TypeVar

from memfabric.client.address import server_address
from memfabric.client.link import open_link
from memfabric.client.options import client_name
from memfabric.core.messages import (
    Attach,
    Attached,
    Body,
    Document,
    GetStatus,
    NamespaceCreate,
    NamespaceDelete,
    NamespaceInfo,
    NamespaceList,
    Namespaces,
    NamespaceSpec,
    NodeDrain,
    View,
)
from memfabric.errors import MemfabricError, RefusalCode, RefusedError, UsageError

R = TypeVar("R")


class _Deaf:
    """An administrative session is pushed nothing."""

    def on_joined(self, attached: Attached, epoch: int) -> None:
        """Nothing to learn."""

    def on_view(self, view: View) -> None:
        """Not subscribed."""

    def on_removed(self, keys: bytes) -> None:
        """Not subscribed."""

    def take_touched(self) -> bytes:
        """It reads no blocks."""
        return b""


class AdminClient:
    """Status, nodes and namespaces of a pool. Blocking, thread-safe, a context manager.

    Errors of every call: `RefusedError` (not applied), `UnavailableError` (reads, or not applied),
    `OutcomeUnknownError` (unknown; doing it again is safe).
    """

    def __init__(self, address: str | None = None, *, timeout_s: float = 5.0, name: str | None = None) -> None:
        """Attach to a server.

        Args:
            address: see `connect`.
            timeout_s: deadline of this and of every later call.

        Raises:
            UnavailableError: no server answered in time. RefusedError: it said no. UsageError: wrong
                arguments.
        """
        self._timeout_ns = int(timeout_s * 1e9)
        self._closed = False
        self._pid = os.getpid()
        self.address = server_address(address)
        self._link, _ = open_link(self.address, Attach(nonce=b"", client=client_name(name)), _Deaf(), timeout_s)

    def status(self) -> dict[str, Any]:
        """The whole pool at a glance; keys as documented in docs/cli.md."""
        return self._ask(GetStatus(), Document).doc

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes of `status`."""
        nodes: list[dict[str, Any]] = self.status()["nodes"]
        return nodes

    def drain(self, node: str, *, undo: bool = False) -> None:
        """Put no new blocks on a node (`undo`: again). Its blocks stay readable until they are evicted."""
        self._ask(NodeDrain(node=node, undo=undo), object)

    def namespaces(self) -> list[NamespaceInfo]:
        """All namespaces."""
        return self._ask(NamespaceList(), Namespaces).items

    def namespace_show(self, name: str) -> NamespaceInfo:
        """One namespace.

        Raises:
            RefusedError: `unknown_namespace`.
        """
        found = self.namespaces()
        for info in found:
            if info.spec.name == name:
                return info
        known = ", ".join(sorted(info.spec.name for info in found)) or "none"
        raise RefusedError(RefusalCode.UNKNOWN_NAMESPACE, f"there is no namespace {name!r}; there are: {known}")

    def namespace_create(self, spec: NamespaceSpec) -> NamespaceInfo:
        """Create a namespace; the same again is done already. Returns it as it is now.

        Raises:
            RefusedError: `namespace_exists` with another specification, or `bad_request`.
        """
        self._ask(NamespaceCreate(spec=spec), object)
        return self.namespace_show(spec.name)

    def namespace_delete(self, name: str, *, force: bool = False) -> None:
        """Drop a namespace and its blocks.

        Raises:
            RefusedError: `namespace_busy`: it holds blocks or sessions, and not `force`.
        """
        self._ask(NamespaceDelete(name=name, force=force), object)

    def close(self) -> None:
        """End the I/O thread. Idempotent."""
        if not self._closed and os.getpid() == self._pid:
            self._closed = True
            self._link.detach()
            self._link.close()

    def _ask(self, body: Body, expected: type[R]) -> R:
        if self._closed or os.getpid() != self._pid:
            raise UsageError("this client is closed, or belongs to a parent process; connect again")
        answer = self._link.submit(body, time.monotonic_ns() + self._timeout_ns).result()
        if not isinstance(answer.body, expected):
            raise MemfabricError(f"unexpected answer {type(answer.body).__name__}; is the server another release?")
        return answer.body

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<AdminClient at {self.address}{', closed' if self._closed else ''}>"
