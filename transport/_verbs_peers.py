"""The client's side of verbs connections: one to each owner for reading and one for writing, made anew after a loss."""

from __future__ import annotations

import threading
import time
from typing import Any

from transport._verbs_devices import Choice
from transport._verbs_messages import VERSION, Descriptor, Hello, Welcome, decode, encode
from transport._verbs_owner import Link, memlock_advice
from transport.base import Exchange
from transport.errors import (
    DescriptorError,
    NotConnectedError,
    TimedOutError,
    TransportError,
    UnreachableError,
)

Pieces = list[tuple[int, int, int, int]]
_HELLO_REGIONS = 4096


class _Peer:
    """One owner's life, for reading or for writing: a connection, and what is reached over it."""

    def __init__(self, number: int, owner: bytes, writable: bool, exchange: Exchange) -> None:
        self.number, self.owner, self.writable, self.exchange = number, owner, writable, exchange
        self.regions: dict[int, Descriptor] = {}
        self.users = 0  # threads that connect to it
        self.lock = threading.Lock()

    def hold(self, end_ns: int) -> None:
        """Take the lock, under which it is met."""
        if not self.lock.acquire(timeout=max(0.0, (end_ns - time.monotonic_ns()) / 1e9)):
            raise TimedOutError("the deadline passed while another thread was connecting to the same owner")


class Peers:
    """All of one transport. Thread-safe.

    Args:
        client: The native client, which has the queues and the regions by handle.
    """

    def __init__(self, device: Any, choice: Choice, link: Link, client: Any) -> None:
        self._device, self._choice, self._link, self._client = device, choice, link, client
        self._reads = max(1, min(255, choice.device.limits["max_reads_asked"]))
        self._guard = threading.Lock()
        self._peers: dict[tuple[bytes, bool], _Peer] = {}
        self._by_number: dict[int, _Peer] = {}
        self._of_handle: dict[int, _Peer] = {}
        self._next = 0
        self._closed = False
        self.connects = 0

    def connect(self, told: Descriptor, writable: bool, exchange: Exchange, end_ns: int) -> int:
        """A handle for a region.

        Raises:
            UnreachableError, TimedOutError, or what the exchange raises: not applied.
        """
        peer = self._peer(told.owner, writable, exchange)
        try:
            peer.hold(end_ns)
            try:
                peer.exchange = exchange
                alive = self._client.alive(peer.number)
                found = self._meet(peer, [*([] if alive else peer.regions.values()), told], not alive, end_ns)
                if not found[-1]:
                    raise UnreachableError(f"region {told.region_id:#x} is not lent any more")
                handle: int = self._client.add(peer.number, told.size_bytes, writable, found[-1])
                with self._guard:
                    closed = self._closed
                    peer.regions[handle] = told
                    self._of_handle[handle] = peer
            finally:
                peer.lock.release()
        finally:
            with self._guard:
                peer.users -= 1
            self._let_go(peer)
        if closed:
            raise TransportError("this transport is closed")
        return handle

    def disconnect(self, handle: int) -> None:
        """Forget a handle. Raises `NotConnectedError`."""
        with self._guard:
            peer = self._of_handle.pop(handle, None)
            if peer is not None:
                del peer.regions[handle]
        if peer is None or not self._client.remove(handle):
            raise NotConnectedError(f"handle {handle} is not connected")
        self._let_go(peer)

    def reconnect(self, number: int, end_ns: int) -> str:
        """Make a lost connection anew; why not, if not."""
        with self._guard:
            peer = self._by_number.get(number)
        if peer is None:
            return "the region was disconnected"
        try:
            peer.hold(end_ns)
            try:
                if not self._client.alive(number):
                    self._meet(peer, list(peer.regions.values()), True, end_ns)
            finally:
                peer.lock.release()
        except TransportError as error:
            return f"the connection was lost and can't be made anew: {error}"
        return ""

    def close(self) -> None:
        """Nothing is connected from now on."""
        with self._guard:
            self._closed = True

    def _peer(self, owner: bytes, writable: bool, exchange: Exchange) -> _Peer:
        with self._guard:
            if self._closed:
                raise TransportError("this transport is closed")
            peer = self._peers.get((owner, writable))
            if peer is None:
                peer = _Peer(self._next, owner, writable, exchange)
                self._next += 1
                self._peers[owner, writable] = self._by_number[peer.number] = peer
            peer.users += 1
            return peer

    def _let_go(self, peer: _Peer) -> None:
        """Forget a peer if nothing is reached over it; its connection ends."""
        with self._guard:
            idle = not peer.users and not peer.regions and self._by_number.pop(peer.number, None) is not None
            if idle:
                del self._peers[peer.owner, peer.writable]
        if idle:
            self._client.drop(peer.number)

    def _meet(self, peer: _Peer, regions: list[Descriptor], connect: bool, end_ns: int) -> list[Pieces]:
        """Ask an owner for regions, and for a new connection; the pieces of each. With the peer's lock held."""
        from transport import _verbs

        if len(regions) > _HELLO_REGIONS:
            raise UnreachableError(f"more than {_HELLO_REGIONS} regions of one owner over verbs")
        try:
            end = _verbs.End.of_client(self._client) if connect else None
        except _verbs.VerbsError as error:
            code, why = error.args
            raise UnreachableError(f"{self._choice} makes no queue pair: {why}{memlock_advice(code)}") from None
        mine = self._link.queue(end, self._choice, self._device.gid, self._reads) if end else None
        asked = [(each.region_id, each.serial) for each in regions]
        raw = peer.exchange(encode(Hello(VERSION, peer.owner, peer.writable, mine, asked)), end_ns)
        welcome = _read(raw, regions, connect)
        if end is not None and welcome.queue is not None:
            try:
                # The owner asks for signs of life by writes of no bytes; no memory here is open to it.
                self._link.join(end, welcome.queue, _verbs.REMOTE_WRITE, self._reads)
            except _verbs.VerbsError as error:
                raise UnreachableError(f"{self._choice} can't connect to the owner: {error.args[1]}") from None
            for handle, told in list(peer.regions.items()):
                self._client.replace(peer.number, handle, welcome.regions[regions.index(told)])
            self._client.use(peer.number, end)
            self.connects += 1
        return welcome.regions


def _read(raw: bytes, regions: list[Descriptor], connect: bool) -> Welcome:
    try:
        welcome = decode(Welcome, raw)
        if len(welcome.regions) != len(regions) or (welcome.queue is None) == connect:
            raise DescriptorError("it does not answer what was asked")
        for each, pieces in zip(regions, welcome.regions, strict=True):
            check_pieces(pieces, each.size_bytes)
    except DescriptorError as error:
        raise UnreachableError(f"the owner's welcome can't be used: {error}") from error
    return welcome


def check_pieces(pieces: Pieces, size_bytes: int) -> None:
    """None at all, or the whole region without gaps."""
    at = 0
    for offset, length, address, _ in pieces:
        if offset != at or not 1 <= length <= size_bytes - at or address + length > 1 << 64:
            raise DescriptorError("pieces of a region that do not fit one another")
        at += length
    if pieces and at != size_bytes:
        raise DescriptorError(f"pieces of {at} bytes for a region of {size_bytes}")
