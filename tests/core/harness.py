"""A server core with a clock, nodes that obey, and clients that ask: what the core's tests stand on."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from memfabric.core import messages as m
from memfabric.core.keys import BlockKeys
from memfabric.core.server import ServerCore
from memfabric.core.state import Publish, Received, Send, ServerConfig, Tick

MS = 1_000_000
BLOCK_BYTES = 64 << 10
REGION_BYTES = 1 << 20  # 15 blocks of 64 KiB


class Harness:
    """Runs a `ServerCore`; every step checks the invariants."""

    def __init__(self, **config: Any) -> None:
        self.now_ns = 10**9
        self.core = ServerCore(ServerConfig(epoch=7, **config), now_ns=self.now_ns)
        self.published: list[Publish] = []
        self.commands: list[m.Command] = []
        self.nodes: dict[str, int] = {}
        self.deaf: set[str] = set()
        """Nodes that do not answer commands."""
        self._sequence = itertools.count(1)
        self._region_ids = itertools.count(1)
        self.replies: dict[int, m.ReplyBody] = {}
        self._requests: dict[int, tuple[bytes, m.Request]] = {}

    def _handle(self, event: Any) -> list[m.Reply]:
        effects = self.core.handle(event, self.now_ns)
        self.core.check_invariants()
        replies = [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, m.Reply)]
        self.published += [e for e in effects if isinstance(e, Publish)]
        commands = [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, m.Command)]
        for reply in replies:
            self.replies[reply.sequence] = reply.body
        for command in commands:
            self.commands.append(command)
            self._obey(command)
        return replies

    def _obey(self, command: m.Command) -> None:
        for name, incarnation in self.nodes.items():
            if incarnation == command.incarnation and name not in self.deaf:
                self.ask(m.CommandDone(node=name, incarnation=incarnation, command=command.command), peer=name.encode())

    def ask(self, body: Any, *, session: int = 0, peer: bytes = b"client", sequence: int | None = None) -> Any:
        """Send a request; its reply's body, or None when it is parked."""
        sequence = next(self._sequence) if sequence is None else sequence
        request = m.Request(session=session, sequence=sequence, body=body)
        self._requests[sequence] = (peer, request)
        self.replies.pop(sequence, None)
        self._handle(Received(peer, request))
        return self.replies.get(sequence)

    def repeat(self, sequence: int) -> Any:
        """Send the very same request again."""
        peer, request = self._requests[sequence]
        self.replies.pop(sequence, None)
        self._handle(Received(peer, request))
        return self.replies.get(sequence)

    @property
    def last_sequence(self) -> int:
        return max(self._requests)

    def tick(self, ms: float, *, beat: bool = True) -> None:
        """Let time pass in small steps; living nodes report."""
        end = self.now_ns + int(ms * MS)
        while self.now_ns < end:
            deadline = self.core.next_deadline_ns()
            step = 100 * MS if deadline is None else max(1, min(deadline - self.now_ns, 100 * MS))
            self.now_ns = min(end, self.now_ns + step)
            if beat:
                for name, incarnation in self.nodes.items():
                    self.ask(m.Heartbeat(node=name, incarnation=incarnation), peer=name.encode())
            self._handle(Tick())

    def join(self, name: str, regions: int = 2, *, incarnation: int | None = None) -> Any:
        """A node registers with fresh regions."""
        incarnation = incarnation or len(self._requests) + 1000
        offers = [
            m.RegionOffer(region_id=next(self._region_ids), size_bytes=REGION_BYTES, descriptor=b"d")
            for _ in range(regions)
        ]
        self.nodes[name] = incarnation
        body = m.Register(node=name, incarnation=incarnation, host="h", regions=offers)
        reply = self.ask(body, peer=name.encode())
        if isinstance(reply, m.Refused):
            del self.nodes[name]
        return reply

    def attach(self, namespace: str = "ns", *, peer: bytes = b"client", **spec: Any) -> int:
        """A session; the namespace is created with the given fields."""
        full = m.NamespaceSpec(**{"name": namespace, "block_bytes": BLOCK_BYTES, **spec})
        reply = self.ask(m.Attach(nonce=peer, namespace=namespace, create=full), peer=peer)
        assert isinstance(reply, m.Attached), reply
        return reply.session

    # --- what a client does ---

    def reserve(self, session: int, keys: BlockKeys, *, ttl_ms: float = 10_000, peer: bytes = b"client") -> Any:
        tokens = np.full(len(keys), 16, np.uint32)
        return self.ask(
            m.Reserve(
                keys=keys.keys.tobytes(),
                parents=keys.parents.tobytes(),
                tokens=tokens.tobytes(),
                ttl_ns=int(ttl_ms * MS),
            ),
            session=session,
            peer=peer,
        )

    def put(self, session: int, keys: BlockKeys, *, peer: bytes = b"client") -> np.ndarray:
        """Reserve and commit; returns the reserve statuses."""
        reserved = self.reserve(session, keys, peer=peer)
        assert isinstance(reserved, m.Reserved), reserved
        status = np.frombuffer(reserved.status, np.uint8)
        granted = int((status == m.ReserveStatus.GRANTED).sum())
        if granted:
            done = self.ask(m.Commit(lease=reserved.lease, stored=b"\1" * granted), session=session, peer=peer)
            assert isinstance(done, m.Committed), done
        return status

    def match(self, session: int, keys: BlockKeys, *, peer: bytes = b"client") -> int:
        reply = self.ask(m.Match(keys=keys.keys.tobytes()), session=session, peer=peer)
        assert isinstance(reply, m.Matched), reply
        return reply.count

    def acquire(
        self, session: int, keys: BlockKeys, *, ttl_ms: float = 10_000, prefix: bool = False, peer: bytes = b"client"
    ) -> Any:
        return self.ask(
            m.Acquire(keys=keys.keys.tobytes(), ttl_ns=int(ttl_ms * MS), prefix=prefix), session=session, peer=peer
        )

    def info(self, namespace: str = "ns") -> m.NamespaceInfo:
        return self.core.state.info(self.core.state.by_name[namespace])


def chain(seed: int, count: int) -> BlockKeys:
    """A chain of `count` keys that depends on the seed alone."""
    return BlockKeys.chain(np.random.default_rng(seed).integers(1, 256, (count, 16), dtype=np.uint8))


def columns(reply: m.Acquired | m.Reserved) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """status, region, block, generation."""
    return (
        np.frombuffer(reply.status, np.uint8),
        np.frombuffer(reply.region, np.uint32),
        np.frombuffer(reply.block, np.uint32),
        np.frombuffer(reply.generation, np.uint64),
    )
