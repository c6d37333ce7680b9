"""What an operation may ask for, and who carries it out.

Operations (`reading`, `writing`, `leases`) are generators that yield effects and are sent their results: one
logic for the blocking and the asyncio client. Responsible for the effects and the two drivers; it knows no
operation.

An operation that is abandoned (an exception in the caller, a cancelled task) is closed: its ``finally``
clauses run and may post messages, but must not yield.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future
from typing import Any, Protocol, TypeVar

from memfabric.client.calls import Answer
from memfabric.core.messages import Body

INLINE_BYTES = 128 << 10
"""Copies up to this size run on the event loop itself: handing one to a thread and back costs more (about 50
µs)."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Rpc:
    """Ask the server; the result is an `Answer`."""

    body: Body
    deadline_ns: int


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """Call a function that copies about `size_bytes`; the result is its own."""

    function: Callable[[], Any]
    size_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Pause:
    """Wait."""

    duration_ns: int


Effect = Rpc | Work | Pause
Operation = Generator[Effect, Any, T]


class Submits(Protocol):
    """Where requests go (`link.Link`)."""

    def submit(self, body: Body, deadline_ns: int) -> Future[Answer]:
        """Send; the future ends at the deadline at the latest."""

    def discard(self, future: Future[Answer]) -> None:
        """The future is no longer waited for; what its answer grants is given back."""


def run(operation: Operation[T], link: Submits) -> T:
    """Carry an operation out in the calling thread."""
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            effect = operation.send(value) if error is None else operation.throw(error)
        except StopIteration as stop:
            result: T = stop.value
            return result
        value, error = None, None
        try:
            if isinstance(effect, Work):
                value = effect.function()
            elif isinstance(effect, Rpc):
                value = _wait(effect, link)
            else:
                time.sleep(effect.duration_ns / 1e9)
        except BaseException as raised:  # noqa: BLE001  # the operation decides
            error = raised


def _wait(effect: Rpc, link: Submits) -> Answer:
    future = link.submit(effect.body, effect.deadline_ns)
    try:
        return future.result()
    except BaseException:  # the answer's own error, or KeyboardInterrupt
        link.discard(future)
        raise


async def _wait_async(effect: Rpc, link: Submits) -> Answer:
    future = link.submit(effect.body, effect.deadline_ns)
    try:
        return await asyncio.wrap_future(future)
    except BaseException:  # cancelled: the answer may be there already, and nobody will look at it
        link.discard(future)
        raise


async def run_async(operation: Operation[T], link: Submits, executor: Executor) -> T:
    """Carry an operation out on the running event loop, which is never blocked for longer than `INLINE_BYTES`
    take.

    When the task is cancelled during a copy, the copy is waited for first: it still touches the caller's
    buffers.
    """
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            effect = operation.send(value) if error is None else operation.throw(error)
        except StopIteration as stop:
            result: T = stop.value
            return result
        value, error = None, None
        try:
            if isinstance(effect, Work):
                value = await _work(effect, executor)
            elif isinstance(effect, Rpc):
                value = await _wait_async(effect, link)
            else:
                await asyncio.sleep(effect.duration_ns / 1e9)
        except BaseException as raised:  # noqa: BLE001  # the operation decides
            error = raised


async def _work(effect: Work, executor: Executor) -> Any:
    if effect.size_bytes <= INLINE_BYTES:
        return effect.function()
    running = asyncio.get_running_loop().run_in_executor(executor, effect.function)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError:
                continue
        raise
