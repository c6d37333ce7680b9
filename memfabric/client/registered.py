"""Local memory that stays registered with the transports, so that RDMA goes straight to and from it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from memfabric.client.effects import Operation, Work
from memfabric.client.engine import Engine
from memfabric.client.memory import Extent, extent_of
from memfabric.errors import UsageError

_PIN_BYTES = 1 << 30
"""Registering pins pages, which takes long: never on an event loop."""


class Registration:
    """Registered memory; a context manager. `close` ends it, as does closing the client. It keeps the memory alive."""

    def __init__(self, engine: Engine, extents: list[Extent]) -> None:
        self._engine = engine
        self._extents = extents

    @property
    def size_bytes(self) -> int:
        """All of it together."""
        return sum(extent.size_bytes for extent in self._extents)

    def close(self) -> None:
        """Give it back. Idempotent; calls under way are not harmed."""
        extents, self._extents = self._extents, []
        for extent in extents:
            self._engine.transport.forget(extent.address, extent.size_bytes)

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Registration of {self.size_bytes} bytes>"


def register(engine: Engine, memory: Any) -> Operation[Registration]:
    """See `sync.Client.register`."""
    items = list(memory) if isinstance(memory, (list, tuple)) else [memory]
    extents = [extent_of(item, f"memory[{at}]" if len(items) > 1 else "memory") for at, item in enumerate(items)]
    for extent in extents:
        if extent.device is not None:
            raise UsageError("memory to register must be the host's; GPU memory is staged, or moved by the transport")
        if not extent.size_bytes or not extent.writable:
            raise UsageError("memory to register must be writable and not empty")

    def prepare() -> None:
        for extent in extents:
            engine.transport.prepare(extent.address, extent.size_bytes)

    yield Work(prepare, _PIN_BYTES)
    return Registration(engine, extents)
