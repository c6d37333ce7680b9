"""The server's loop: frames in, `ServerCore`, frames out. One thread, one process.

It turns sockets and time into events and effects into I/O, and decides nothing. Whatever bytes
arrive, the loop goes on.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import zmq

from memfabric import logs, wire
from memfabric.core.messages import MAX_FRAME_BYTES, Refused, Reply, Request
from memfabric.core.server import ServerCore
from memfabric.core.state import Effect, Log, Paused, Publish, Received, SaveNamespaces, Send, ServerConfig, Tick
from memfabric.errors import RefusalCode, UnavailableError
from memfabric.server.options import ServerOptions, split_tcp
from memfabric.server.store import FileStore

_BATCH = 256
"""Frames handled before time and other sockets get their turn."""
_STALL_NS = 100_000_000
"""A loop that comes round this much late was stopped or starved; the time does not count against others."""
_LONGEST_WAIT_NS = 1_000_000_000
_BAD_FRAME_LOG_NS = 10_000_000_000


class Server:
    """A bound metadata server. Create it, `run` it in some thread, `stop` it from any."""

    def __init__(self, options: ServerOptions) -> None:
        """Bind the sockets and take the state directory.

        Raises:
            UsageError: impossible options.
            UnavailableError: the address or the state directory is taken.
        """
        options.check()
        self._log = logs.EventLog("server")
        self._store = FileStore(options.state_dir)
        self._context = zmq.Context(io_threads=1)
        try:
            self._requests = self._socket(zmq.ROUTER, options.address)
            self._events = self._socket(zmq.PUB, options.address)
            self.address = _bind(self._requests, options.address)
            self.events_address = _bind(self._events, _events_bind(options.address))
        except BaseException:
            self._context.destroy(linger=0)
            self._store.close()
            raise
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stopping = threading.Event()
        self.core = ServerCore(
            ServerConfig(
                epoch=self._store.epoch,
                address=self.address,
                events_address=self.events_address,
                heartbeat_ns=options.heartbeat_ns,
                dead_ns=options.dead_ns,
                session_ttl_ns=options.session_ttl_ns,
                max_lease_ns=options.max_lease_ns,
                quarantine_ns=options.quarantine_ns,
            ),
            self._store.namespaces,
            now_ns=time.monotonic_ns(),
        )
        self._bad_frames_logged_ns = 0
        self._read_ns = time.monotonic_ns()

    def _socket(self, kind: int, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.set(zmq.SNDHWM, 4096)
        socket.set(zmq.RCVHWM, 4096)
        socket.set(zmq.IPV6, int("[" in address))
        socket.set(zmq.HEARTBEAT_IVL, 5000)
        socket.set(zmq.HEARTBEAT_TIMEOUT, 15_000)
        if kind == zmq.ROUTER:
            socket.set(zmq.ROUTER_HANDOVER, 1)  # a client that reconnects keeps its identity
        return socket

    def stop(self) -> None:
        """Make `run` return soon; safe from signal handlers and other threads."""
        self._stopping.set()
        os.write(self._wake_write, b"x")

    def run(self) -> None:
        """Serve until `stop`; then release sockets and the state directory."""
        self._read_ns = time.monotonic_ns()
        self._log.event("info", "serving", address=self.address, events=self.events_address, epoch=self._store.epoch)
        try:
            self._loop()
        finally:
            self._context.destroy(linger=100)
            self._store.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._log.event("info", "stopped")

    def _loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self._requests, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        while not self._stopping.is_set():
            now_ns = self._now_ns()
            deadline_ns = self.core.next_deadline_ns()
            wait_ns = _LONGEST_WAIT_NS if deadline_ns is None else min(max(0, deadline_ns - now_ns), _LONGEST_WAIT_NS)
            poller.poll(-(-wait_ns // 1_000_000))
            self._now_ns(waited_ns=wait_ns)
            if not self._receive_batch():
                self._perform(self.core.handle(Tick(), self._now_ns()))

    def _now_ns(self, *, waited_ns: int = 0) -> int:
        """The monotonic clock. Detects that this process was stopped or starved since the clock was read last.

        After such a pause, what others sent meanwhile is still in the queue: they were not silent.
        """
        now_ns = time.monotonic_ns()
        lost_ns = now_ns - self._read_ns - waited_ns
        self._read_ns = now_ns
        if lost_ns > _STALL_NS:
            self._log.event("warning", "was_paused", seconds=round(lost_ns / 1e9, 3))
            self._perform(self.core.handle(Paused(lost_ns), now_ns))
        return now_ns

    def _receive_batch(self) -> int:
        count = 0
        while count < _BATCH:
            try:
                frames = self._requests.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            count += 1
            self._receive(frames)
        return count

    def _receive(self, frames: list[bytes]) -> None:
        peer = frames[0]
        try:
            if len(frames) != 2:
                raise wire.FrameError(f"{len(frames) - 1} parts, expected 1")
            request = wire.decode(frames[1], Request)
        except wire.FrameError as error:
            self._bad_frame(peer, error)
            return
        self._perform(self.core.handle(Received(peer, request), self._now_ns()))

    def _bad_frame(self, peer: bytes, error: wire.FrameError) -> None:
        """Count it, say it now and then, and tell a peer of another version why it gets no answer."""
        self.core.state.counters["bad_frames"] += 1
        now_ns = time.monotonic_ns()
        if now_ns - self._bad_frames_logged_ns > _BAD_FRAME_LOG_NS:
            self._bad_frames_logged_ns = now_ns
            self._log.event("warning", "bad_frame", error=str(error)[:300])
        if error.version is not None:
            body = Refused(code=RefusalCode.VERSION, message=str(error))
            self._perform([Send(peer, Reply(session=0, sequence=0, epoch=self._store.epoch, body=body))])

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._send(effect)
            elif isinstance(effect, Publish):
                self._publish(effect)
            elif isinstance(effect, SaveNamespaces):
                self._store.save(effect.specs)
            elif isinstance(effect, Log):
                self._log.event(effect.level, effect.event, **effect.fields)

    def _send(self, effect: Send) -> None:
        try:
            self._requests.send_multipart([effect.peer, wire.encode(effect.message)], zmq.NOBLOCK)
        except (zmq.Again, wire.FrameError) as error:
            self.core.state.counters["unsent_replies"] += 1
            self._log.event("error", "reply_not_sent", error=str(error))

    def _publish(self, effect: Publish) -> None:
        try:
            self._events.send_multipart([effect.topic, wire.encode(effect.message)], zmq.NOBLOCK)
        except (zmq.Again, wire.FrameError) as error:
            self._log.event("error", "event_not_published", error=str(error))


def _events_bind(address: str) -> str:
    if address.startswith("ipc://"):
        return address + ".events"
    return f"tcp://{split_tcp(address)[0]}:*"


def _bind(socket: zmq.Socket[bytes], address: str) -> str:
    if address.startswith("tcp://") and split_tcp(address)[1] == "0":
        address = address[:-1] + "*"
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise UnavailableError(
            f"cannot bind {address}: {error}; is another server running there? Choose another --address"
        ) from error
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))


def serve(options: ServerOptions, *, ready: Callable[[str], None] | None = None) -> None:
    """Run a metadata server until SIGTERM or SIGINT; call it in the main thread of a process of its own.

    Args:
        ready: called with the bound address once requests are taken.

    Raises:
        UsageError, UnavailableError: it could not start.
    """
    logs.setup(options.log_level, as_json=options.log_json)
    server = Server(options)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        server.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    if ready is not None:
        ready(server.address)
    server.run()
