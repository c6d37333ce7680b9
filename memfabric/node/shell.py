"""The node's loop: register, heartbeat, commands. The data path does not pass through here.

A node that was declared dead, or whose server forgot it, comes back as a new incarnation with fresh regions: whoever
could still write to the old ones then writes to memory that nobody reads.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar

import zmq

import transport
from memfabric import logs, wire
from memfabric.core.messages import (
    MAX_FRAME_BYTES,
    Accept,
    Body,
    Command,
    CommandDone,
    Done,
    Heartbeat,
    Refused,
    Register,
    Registered,
    Reply,
    Request,
    Unregister,
)
from memfabric.errors import OutcomeUnknownError, RefusalCode, RefusedError, UnavailableError, UsageError
from memfabric.node.arena import Arena
from memfabric.node.fabrics import make_fabrics
from memfabric.node.options import NodeOptions

_REGISTER_RETRY_S = 0.5
_UNREGISTER_TIMEOUT_S = 1.0
_BAD_FRAME_LOG_S = 10.0
_MIN_HEARTBEAT_S, _MAX_HEARTBEAT_S = 0.005, 60.0

R = TypeVar("R", Registered, Done)


class Node:
    """A memory node. Create it (backs the arena), `run` it in some thread, `stop` it from any."""

    def __init__(self, options: NodeOptions, *, progress: Callable[[int], None] | None = None) -> None:
        """Back the arena with memory; first remove what dead nodes left in the directory.

        Raises:
            UsageError: impossible options.
            transport.TransportError: memory is short, or the directory cannot be used.
        """
        options.check()
        self.options = options
        self._progress = progress
        self._log = logs.EventLog("node")
        self._shm = transport.ShmTransport(directory=str(options.directory))
        swept = self._shm.sweep()
        if swept:
            self._log.event("info", "removed_leftovers", files=len(swept))
        self._arena = self._make_arena()
        self._context = zmq.Context(io_threads=1)
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stopping = threading.Event()
        # Formatting a region can take long (scrubbing gigabytes); who wants to connect does not wait for it.
        self._work: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._hellos: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[CommandDone] = queue.SimpleQueue()
        self._sequence = 0
        self._bad_frame_logged_s = -_BAD_FRAME_LOG_S
        self._socket = self._connect()

    def _make_arena(self) -> Arena:
        """Regions and the transports that lend them: new ones for every incarnation.

        Raises:
            UsageError: a transport cannot be used. transport.TransportError: memory is short.
        """
        fabrics, missing = make_fabrics(self.options)
        try:
            arena = Arena(self._shm, self.options, fabrics, progress=self._progress)
        except BaseException:
            for each in fabrics.values():
                each.close()
            raise
        for name, each in fabrics.items():
            facts = {key: value for key, value in each.info().items() if "\n" not in value}
            self._log.event("info", "transport", transport=name, path=each.capabilities.data_path, **facts)
        for name, why in missing.items():
            self._log.event("warning", "transport_not_usable", transport=name, why=why[:300])
        return arena

    def _connect(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.set(zmq.SNDHWM, 1000)
        socket.set(zmq.RCVHWM, 1000)
        socket.set(zmq.IPV6, int("[" in self.options.server))
        socket.set(zmq.ROUTING_ID, b"node" + os.urandom(12))
        socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        socket.connect(self.options.server)
        return socket

    def stop(self) -> None:
        """Make `run` return soon; safe from signal handlers and other threads."""
        self._stopping.set()
        self._wake()

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"x")
        except BlockingIOError:
            pass  # the pipe is full: the loop is going to wake up anyway

    def run(self, *, ready: Callable[[], None] | None = None) -> None:
        """Serve until `stop`; then leave the pool and give the memory back.

        Args:
            ready: called once the node is registered.

        Raises:
            UnavailableError: the server was not reached within `register_timeout_s` at the start.
            RefusedError: the server does not take this node (its name is taken, …).
        """
        workers = [
            threading.Thread(target=self._do_commands, args=(each,), name=name, daemon=True)
            for each, name in ((self._work, "memfabric-node-commands"), (self._hellos, "memfabric-node-hellos"))
        ]
        for worker in workers:
            worker.start()
        try:
            registered = self._register(deadline_s=time.monotonic() + self.options.register_timeout_s)
            if registered is not None:
                self._log.event(
                    "info",
                    "registered",
                    node=self.options.name,
                    regions=self.options.region_count,
                    bytes=self.options.region_count * self.options.region_bytes,
                )
                if ready is not None:
                    ready()
                self._loop(registered)
                self._leave()
        finally:
            self._work.put(None)
            self._hellos.put(None)
            for worker in workers:
                worker.join(timeout=5.0)
            self._context.destroy(linger=100)
            self._arena.close()
            self._shm.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._log.event("info", "stopped", node=self.options.name)

    # --- talking to the server ---

    def _send(self, body: Body) -> int:
        self._sequence += 1
        frame = wire.encode(Request(session=0, sequence=self._sequence, body=body))
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            pass  # not connected for long: nothing waits in the queue for ever, the next heartbeat says the same
        return self._sequence

    def _receive(self, timeout_s: float) -> Reply | Command | None:
        """The next good message, or None when the time is over or `stop` was called."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        events = dict(poller.poll(max(0, int(timeout_s * 1000))))
        if self._wake_read in events:
            os.read(self._wake_read, 4096)
        if self._socket not in events:
            return None
        try:
            return wire.decode(self._socket.recv(zmq.NOBLOCK), Reply, Command)
        except (zmq.Again, wire.FrameError) as error:
            if time.monotonic() - self._bad_frame_logged_s > _BAD_FRAME_LOG_S:
                self._bad_frame_logged_s = time.monotonic()
                self._log.event("warning", "bad_frame", error=str(error)[:300])
            return None

    def _call(self, body: Body, wanted: type[R], timeout_s: float) -> R | Refused:
        """Ask and wait for the answer; commands that come meanwhile are queued, other messages are dropped.

        Raises:
            OutcomeUnknownError: no answer in time.
        """
        sequence = self._send(body)
        end_s = time.monotonic() + timeout_s
        while (left_s := end_s - time.monotonic()) > 0 and not (
            self._stopping.is_set() and not isinstance(body, Unregister)
        ):
            message = self._receive(left_s)
            if isinstance(message, Command):
                self._take(message)
            elif (
                isinstance(message, Reply)
                and message.sequence in (sequence, 0)
                and isinstance(message.body, (wanted, Refused))
            ):
                return message.body
        raise OutcomeUnknownError(f"no answer from {self.options.server} within {timeout_s:.1f} s")

    def _register(self, *, deadline_s: float | None) -> Registered | None:
        """Register, however long it takes (until `deadline_s`); None when `stop` was called."""
        answered = None
        while not self._stopping.is_set():
            body = Register(
                node=self.options.name,
                incarnation=self._arena.incarnation,
                host=_boot_id(),
                regions=self._arena.offers(),
                transports=self._arena.transports,
            )
            try:
                answer = self._call(body, Registered, _REGISTER_RETRY_S)
            except OutcomeUnknownError:
                answer = None
            if isinstance(answer, Registered):
                return answer
            answered = answer if isinstance(answer, Refused) else answered
            if isinstance(answer, Refused):
                self._refused(answer, deadline_s)
                self._pause(min(_REGISTER_RETRY_S, max(0.05, answer.retry_after_ns / 1e9)))
            if deadline_s is not None and time.monotonic() > deadline_s:
                if isinstance(answered, Refused):
                    raise RefusedError(answered.code, answered.message)
                raise UnavailableError(
                    f"no metadata server answered at {self.options.server} within "
                    f"{self.options.register_timeout_s:g} s; start one with `memfabric meta` or `memfabric up`"
                )
        return None

    def _refused(self, answer: Refused, deadline_s: float | None) -> None:
        """React to a refused registration: renew, wait, or give up."""
        if answer.code == RefusalCode.STALE_INCARNATION:
            self._renew_arena("declared_dead")
        elif answer.code != RefusalCode.NODE_NAME_TAKEN and not answer.retry_after_ns and deadline_s is not None:
            raise RefusedError(answer.code, answer.message)

    def _pause(self, seconds: float) -> None:
        self._stopping.wait(seconds)

    def _loop(self, registered: Registered) -> None:
        heartbeat_s = _heartbeat_s(registered)
        next_s = time.monotonic()
        while not self._stopping.is_set():
            now_s = time.monotonic()
            if now_s >= next_s:
                self._send(Heartbeat(node=self.options.name, incarnation=self._arena.incarnation))
                next_s = now_s + heartbeat_s
            message = self._receive(next_s - now_s)
            while not self._done.empty():
                self._send(self._done.get())
            if isinstance(message, Command):
                self._take(message)
            elif isinstance(message, Reply) and isinstance(message.body, Refused):
                again = self._must_return(message.body)
                if again is None:
                    return
                heartbeat_s = _heartbeat_s(again)

    def _must_return(self, answer: Refused) -> Registered | None:
        """The server no longer knows this incarnation: come back as a new one. None when `stop` was called."""
        self._log.event("warning", "server_refused", code=answer.code, message=answer.message[:300])
        if answer.code not in (RefusalCode.UNKNOWN_NODE, RefusalCode.STALE_INCARNATION):
            return Registered(heartbeat_ns=int(_REGISTER_RETRY_S * 1e9), dead_ns=0)
        self._renew_arena(answer.code)
        registered = self._register(deadline_s=None)
        if registered is not None:
            self._log.event("info", "registered_again", node=self.options.name)
        return registered

    def _renew_arena(self, why: str) -> None:
        self._log.event("warning", "new_incarnation", why=why, node=self.options.name)
        self._arena.close()
        while not self._stopping.is_set():
            try:
                self._arena = self._make_arena()
                return
            except (transport.TransportError, UsageError) as error:
                # Clients may still map the old regions; they let go when they see the new view. A network may be back
                # in a moment, too.
                self._log.event("error", "no_regions_yet", error=str(error)[:500])
                self._pause(1.0)

    def _leave(self) -> None:
        try:
            body = Unregister(node=self.options.name, incarnation=self._arena.incarnation)
            self._call(body, Done, _UNREGISTER_TIMEOUT_S)
        except OutcomeUnknownError:
            pass  # the server is gone, or will miss our heartbeats: either way the node is out of the view

    # --- commands ---

    def _take(self, command: Command) -> None:
        (self._hellos if isinstance(command.body, Accept) else self._work).put(command)

    def _do_commands(self, commands: queue.SimpleQueue[Command | None]) -> None:
        """Not in the loop, so that it does not hold up heartbeats."""
        while (command := commands.get()) is not None:
            arena = self._arena
            if command.incarnation != arena.incarnation:
                continue
            if isinstance(command.body, Accept):
                done = arena.accept(command.epoch, command.command, command.body)
            else:
                done = arena.execute(command.epoch, command.command, command.body)
            self._done.put(
                CommandDone(
                    node=self.options.name,
                    incarnation=command.incarnation,
                    command=command.command,
                    error=done.error,
                    answer=done.answer,
                )
            )
            self._wake()


def _heartbeat_s(registered: Registered) -> float:
    """What the server asks for, within what makes sense whatever it asks for."""
    return min(max(registered.heartbeat_ns / 1e9, _MIN_HEARTBEAT_S), _MAX_HEARTBEAT_S)


def _boot_id() -> str:
    """Names this boot of this machine: nodes and clients with the same one can share memory."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def serve_node(
    options: NodeOptions,
    *,
    ready: Callable[[], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Run a memory node until SIGTERM or SIGINT; call it in the main thread of a process of its own.

    Args:
        ready: called once the node is registered.
        progress: called with the bytes of the arena backed so far.

    Raises:
        UsageError, UnavailableError, RefusedError: it could not start or was not taken.
        transport.TransportError: memory is short.
    """
    logs.setup(options.log_level, as_json=options.log_json)
    stopped_early = False
    node: Node | None = None

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopped_early
        stopped_early = True
        if node is not None:
            node.stop()
        else:
            raise KeyboardInterrupt  # while memory is being backed: undo and leave

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    try:
        node = Node(options, progress=progress)
    except KeyboardInterrupt:
        return
    if stopped_early:
        node.stop()
    node.run(ready=ready)
