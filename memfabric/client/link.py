"""The client's I/O thread: sockets, clock and wake-ups around `session.Session`.

One daemon thread per client owns both ZeroMQ sockets (a DEALER for requests, a SUB for pushed views and
events); other threads only hand it calls. Responsible for moving frames; what they mean is decided in
`session`, what views mean by the listener, which is called in this thread and must not block for long.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError  # the built-in one only from 3.11 on
from typing import Protocol

import zmq

from memfabric import wire
from memfabric.client.address import check_address, reachable
from memfabric.client.calls import Answer, Call, Opened
from memfabric.client.session import Session
from memfabric.core.messages import (
    MAX_FRAME_BYTES,
    Abort,
    Acquired,
    Attach,
    Attached,
    Body,
    Detach,
    KvEvent,
    Release,
    View,
)
from memfabric.errors import MemfabricError, OutcomeUnknownError, UnavailableError, UsageError

HIGH_WATER_MARK = 1024
IDLE_WAIT_NS = 1_000_000_000
GOODBYE_S = 0.5
HANDSHAKE_MS = 3000
HEARTBEAT_MS = 2000
HEARTBEAT_TIMEOUT_MS = 6000
RECONNECT_MS = 50
MAX_RECONNECT_MS = 500


class Listener(Protocol):
    """Who hears about the pool."""

    def on_joined(self, attached: Attached, epoch: int) -> None:
        """A session is open (again)."""

    def on_view(self, view: View) -> None:
        """Membership was pushed."""

    def on_removed(self, keys: bytes) -> None:
        """These blocks can no longer be found."""

    def take_touched(self) -> bytes:
        """Keys of reads that the server has not heard of; taken once."""


class Link:
    """A connection to the metadata server. `submit` and `post` are thread-safe."""

    def __init__(self, address: str, attach: Attach, listener: Listener) -> None:
        """Nothing is opened before `start`.

        Raises:
            UsageError: the address is not one.
        """
        check_address(address)
        self.address = address
        self.ready: Future[Attached] = Future()
        """Done when the first session is open, or refused for good."""
        self._listener = listener
        self._session = Session(attach, address, _nonce)
        name = attach.namespace.encode()
        # What others store is found by asking; only what is gone must be known.
        self._topics = [b"view/" + name + b"\0", b"kv/" + name + b"\0removed"]
        self._commands: deque[Callable[[int], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._stopping = False
        self._ended = threading.Event()
        self._context = zmq.Context(io_threads=1)
        self._requests: zmq.Socket[bytes] | None = None
        self._events: zmq.Socket[bytes] | None = None
        self._poller = zmq.Poller()
        self._thread = threading.Thread(target=self._run, name="memfabric-link", daemon=True)

    def start(self) -> None:
        """Begin to attach."""
        self._thread.start()

    def submit(self, body: Body, deadline_ns: int) -> Future[Answer]:
        """Send a request; the future ends at the deadline at the latest, with a definite outcome.

        A future that is no longer waited for must be given to `discard`.

        Raises (from the future):
            RefusedError: not applied. UnavailableError: not applied, or a read. OutcomeUnknownError: unknown.
        """
        future: Future[Answer] = Future()

        def settle(end: Answer | MemfabricError) -> None:
            try:
                if isinstance(end, MemfabricError):
                    future.set_exception(end)
                elif not future.set_running_or_notify_cancel():
                    self._give_back(end)
                else:
                    future.set_result(end)
            except InvalidStateError:  # cancelled meanwhile
                if isinstance(end, Answer):
                    self._give_back(end)

        call = Call(body, deadline_ns, settle)
        future.add_done_callback(lambda done: self._cancel(call) if done.cancelled() else None)
        self._hand_over(lambda now_ns: self._session.submit(call, now_ns))
        return future

    def discard(self, future: Future[Answer]) -> None:
        """The caller was interrupted while it waited: a lease that came or still comes is given back."""

        def give_back(done: Future[Answer]) -> None:
            if not done.cancelled() and done.exception() is None:
                self._give_back(done.result())

        if not future.cancel():
            future.add_done_callback(give_back)

    def post(self, body: Body, deadline_ns: int) -> None:
        """Send a request whose answer nobody waits for."""
        try:
            self._hand_over(lambda now_ns: self._session.submit(Call(body, deadline_ns), now_ns))
        except UsageError:
            pass  # closed meanwhile: the session's leases end with it

    def counts(self) -> dict[str, int]:
        """Counters of the protocol."""
        return dict(self._session.counts)

    @property
    def refusal(self) -> MemfabricError | None:
        """Why the server does not have us at present, if it said so."""
        return self._session.refusal

    @property
    def epoch(self) -> int:
        """Incarnation of the service that the session is with; 0 before the first."""
        return self._session.epoch

    def detach(self, timeout_s: float = GOODBYE_S) -> None:
        """End the session and all its leases at the server. The caller has made sure that nothing is being
        written.

        When the server does not answer in time, the session ends there by silence.
        """
        try:
            self.submit(Detach(), time.monotonic_ns() + int(timeout_s * 1e9)).exception(2 * timeout_s)
        except (MemfabricError, FutureTimeoutError):
            pass

    def close(self, timeout_s: float = 2.0) -> None:
        """End the thread; what is not answered ends with an error. Idempotent, bounded."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._notify()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._ended.wait(timeout_s)
        elif self._thread.ident is None:
            self._finish(UnavailableError("the client was closed"))

    # --- handing over ---

    def _hand_over(self, command: Callable[[int], None]) -> None:
        with self._lock:
            if self._stopping:
                raise UsageError("the client is closed")
            self._commands.append(command)
            os.eventfd_write(self._wake, 1)

    def _notify(self) -> None:
        with self._lock:
            if not self._ended.is_set():
                os.eventfd_write(self._wake, 1)

    def _cancel(self, call: Call) -> None:
        try:
            self._hand_over(lambda now_ns: self._session.cancelled(call))
        except UsageError:
            pass

    def _give_back(self, answer: Answer) -> None:
        lease = getattr(answer.body, "lease", 0)
        if lease:
            body: Body = Release(leases=[lease]) if isinstance(answer.body, Acquired) else Abort(lease=lease)
            self.post(body, time.monotonic_ns() + IDLE_WAIT_NS)

    # --- the thread ---

    def _run(self) -> None:
        error: MemfabricError = UnavailableError("the client was closed")
        try:
            self._poller.register(self._wake, zmq.POLLIN)
            self._session.open(time.monotonic_ns())
            while not self._stopping:
                self._step()
        except BaseException as fault:  # whatever it is, no caller may be left waiting
            error = OutcomeUnknownError(
                f"the client's I/O thread failed: {fault!r}; close this client and connect again"
            )
            raise
        finally:
            self._finish(error)

    def _step(self) -> None:
        now_ns = time.monotonic_ns()
        session = self._session
        while self._commands:
            self._commands.popleft()(now_ns)
        session.tick(now_ns)
        if session.ping_due(now_ns):
            session.touched(self._listener.take_touched(), now_ns)
        self._handle_events()
        blocked = self._send()
        if session.refused_for_good and session.refusal is not None and not self.ready.done():
            self.ready.set_exception(session.refusal)
        due_ns = session.next_deadline_ns()
        wait_ns = IDLE_WAIT_NS if due_ns is None else min(max(0, due_ns - now_ns), IDLE_WAIT_NS)
        if self._requests is not None:
            self._poller.register(self._requests, zmq.POLLIN | (zmq.POLLOUT if blocked else 0))
        ready = dict(self._poller.poll(-(-wait_ns // 1_000_000)))
        if self._wake in ready:
            os.eventfd_read(self._wake)
        if self._requests in ready:
            self._receive()
        if self._events in ready:
            self._receive_events()

    def _handle_events(self) -> None:
        for event in self._session.take_events():
            if isinstance(event, Opened):
                self._connect(event.identity)
            else:
                self._subscribe(event.attached.events)
                self._listener.on_joined(event.attached, event.epoch)
                if not self.ready.done():
                    self.ready.set_result(event.attached)

    def _send(self) -> bool:
        """Send what is due; True when the connection takes no more for now."""
        while self._requests is not None:
            outgoing = self._session.next_outgoing()
            if outgoing is None:
                return False
            call, frame = outgoing
            now_ns = time.monotonic_ns()  # before it leaves: a lease in the answer counts from here
            try:
                self._requests.send(frame, zmq.NOBLOCK)
            except zmq.Again:
                self._session.unsent(call)
                return True
            self._session.sent(call, now_ns)
        return False

    def _receive(self) -> None:
        socket = self._requests
        while socket is not None and socket is self._requests:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 1:
                self._session.received(frames[0], time.monotonic_ns())

    def _receive_events(self) -> None:
        assert self._events is not None
        for _ in range(HIGH_WATER_MARK):
            try:
                frames = self._events.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 2:
                continue
            try:
                message = wire.decode(frames[1], View, KvEvent)
            except wire.FrameError:
                continue  # a later view says it all
            if isinstance(message, View):
                self._listener.on_view(message)
            elif isinstance(message, KvEvent) and message.removed:
                self._listener.on_removed(message.removed)

    # --- sockets ---

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.set(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.set(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.set(zmq.IPV6, 1)
        socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.set(zmq.RECONNECT_IVL_MAX, MAX_RECONNECT_MS)
        return socket

    def _drop(self, socket: zmq.Socket[bytes] | None) -> None:
        if socket is not None:
            if socket in self._poller:
                self._poller.unregister(socket)
            socket.close(linger=0)

    def _connect(self, identity: bytes) -> None:
        self._drop(self._requests)
        self._requests = self._socket(zmq.DEALER)
        self._requests.set(zmq.ROUTING_ID, identity)
        # Only to a live connection: what can't be sent stays with us, so that "never left" is known.
        self._requests.set(zmq.IMMEDIATE, 1)
        self._requests.connect(self.address)

    def _subscribe(self, address: str) -> None:
        self._drop(self._events)
        self._events = None
        if len(self._topics[0]) <= len(b"view/\0"):
            return  # an administrative session
        events = self._socket(zmq.SUB)
        for topic in self._topics:
            events.set(zmq.SUBSCRIBE, topic)
        try:
            events.connect(reachable(address, self.address))
        except zmq.ZMQError:
            events.close(linger=0)  # an address that is none: views are asked for instead
            return
        self._events = events
        self._poller.register(events, zmq.POLLIN)

    def _finish(self, error: MemfabricError) -> None:
        with self._lock:
            self._stopping = True
        now_ns = time.monotonic_ns()
        while self._commands:
            self._commands.popleft()(now_ns)
        self._session.stop(error)
        if not self.ready.done():
            self.ready.set_exception(error)
        self._drop(self._requests)
        self._drop(self._events)
        with self._lock:
            self._ended.set()
            os.close(self._wake)
        self._context.term()


def open_link(address: str, attach: Attach, listener: Listener, timeout_s: float) -> tuple[Link, Attached]:
    """Attach to a server; on an error nothing is left behind.

    Raises:
        UsageError: the address or timeout is wrong. RefusedError: the server said no.
        UnavailableError: no server answered within the timeout.
    """
    if not timeout_s > 0:
        raise UsageError(f"timeout_s must be above 0, got {timeout_s}")
    link = Link(address, attach, listener)
    try:
        link.start()
        return link, link.ready.result(timeout_s)
    except FutureTimeoutError as error:
        refusal = link.refusal
        link.close()
        if refusal is not None:
            raise refusal from error
        raise UnavailableError(
            f"no metadata server answered at {address} within {timeout_s:g} s; is one running there? "
            "`memfabric up` starts a pool on this machine"
        ) from error
    except BaseException:
        link.close()
        raise


def _nonce() -> bytes:
    return b"\x01" + os.urandom(15)  # ZeroMQ keeps identities that start with a zero byte to itself
