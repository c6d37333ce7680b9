"""get, put, match and reserve+commit by a client of a pool."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import memfabric
from memfabric import BlockKeys
from memfabric.errors import MemfabricError
from memfabric.perf import messages
from memfabric.perf.blocks import FreshKeys, addresses, enter_pages
from memfabric.perf.memory import Memory
from memfabric.perf.plan import REQUESTS
from memfabric.perf.work import KEY_BYTES, Copies, Sockets, Work

CALL_S = 30.0
_FILL_BLOCKS = 1024
_WARM_TURNS = 3


class PoolWork(Work):
    """See the module. The keys are this client's own."""

    def __init__(self, pool: messages.OpenPool, sockets: Sockets | None, order: messages.Prepare) -> None:
        """Put the working set, get it back, and look at it.

        Raises:
            MemfabricError: the pool could not take or give the blocks; says why.
        """
        self._order, self._sockets = order, sockets
        self._keys: list[BlockKeys] = []
        self._memory = Memory(pool.kind, order.set_count, order.batch, order.block_bytes)
        self._fresh = FreshKeys(order.seed)
        self.blocks = order.batch
        self.size_bytes = 0 if order.op in REQUESTS else order.batch * order.block_bytes
        self._client = memfabric.connect(
            pool.address,
            namespace=order.namespace,
            verify=order.verify,
            copy_threads=order.threads,
            timeout_s=CALL_S,
            name="memfabric-perf",
            shm_directory=pool.directory,
            transport=pool.transport,
            transport_options={pool.transport: pool.options} if pool.options else None,
        )
        try:
            self._try_out()
            self._find_limits(pool.kind)
        except BaseException:
            self._client.close()  # what it put goes with the namespace
            raise

    def _try_out(self) -> None:
        order = self._order
        self._memory.fill(order.seed)
        self._keys = [self._fresh(order.batch) for _ in range(order.set_count)]
        at_once = max(1, _FILL_BLOCKS // order.batch)  # getting ready shall not take longer than what is measured
        parts = [slice(start, start + at_once) for start in range(0, order.set_count, at_once)]
        for part in parts:
            self._client.put(_joined(self._keys[part]), self._memory.batches(part)).raise_for_status()
        self._memory.clear()
        for part in parts:
            self._client.get(_joined(self._keys[part]), self._memory.batches(part)).raise_for_status()
        self._memory.check(order.seed)
        for turn in range(_WARM_TURNS):
            self.op(turn)

    def _find_limits(self, kind: str) -> None:
        order, through = self._order, self._client._engine.transport
        limits = ["memcpy"] if self.size_bytes and kind == "cpu" else []
        limits += ["socket"] if self._sockets is not None else []
        mapped = through.capabilities.zero_copy
        if limits[:1] == ["memcpy"]:
            count = order.set_count * order.batch
            local = np.uint64(self._memory.address) + np.arange(count, dtype=np.uint64) * np.uint64(order.block_bytes)
            if order.op == "get" and mapped:
                enter_pages(self._client, writable=False)
                remote = np.concatenate([addresses(self._client, keys, writable=False) for keys in self._keys])
            else:  # other blocks may be where these were after a put, so it copies elsewhere
                mapped = False
                self._other = Memory(kind, order.set_count, order.batch, order.block_bytes)
                self._other.fill(order.seed)
                remote = local - np.uint64(self._memory.address) + np.uint64(self._other.address)
            to, source = (local, remote) if order.op == "get" else (remote, local)
            self._memcpy = Copies(to, source, order.block_bytes, order.batch, order.threads)
        if self._sockets is not None:
            self.socket(0)  # grows its memory
        paths = self._client.stats()["paths"]
        said = dict.fromkeys(path["data_path"] for path in paths)
        self.ready = messages.Ready(
            data_path="; ".join(said) or "not chosen",
            one_sided=through.capabilities.one_sided if self.size_bytes else None,
            mapped=mapped and bool(self.size_bytes),
            limits=limits,
        )

    def op(self, turn: int) -> int:
        at = turn % len(self._keys)
        if self._order.op == "get":
            return self._get(self._keys[at], self._memory.batch(at))
        if self._order.op == "match":
            return self._match(self._keys[at])
        # Unlike a put that finds its blocks there, this one has to write: so what was there goes first.
        self._client.remove(self._keys[at])
        self._keys[at] = self._fresh(self._order.batch)
        return self._put(self._keys[at], self._memory.batch(at))

    def _get(self, keys: BlockKeys, out: Any) -> int:
        begin = time.perf_counter_ns()
        result = self._client.get(keys, out)
        taken = time.perf_counter_ns() - begin
        if not result.ok:
            result.raise_for_status()
        return taken

    def _match(self, keys: BlockKeys) -> int:
        begin = time.perf_counter_ns()
        found = self._client.match(keys)
        taken = time.perf_counter_ns() - begin
        if found != len(keys):
            raise MemfabricError(f"match found {found} of {len(keys)} blocks that were put")
        return taken

    def _put(self, keys: BlockKeys, blocks: Any) -> int:
        if self._order.op == "put":
            begin = time.perf_counter_ns()
            result = self._client.put(keys, blocks)
            taken = time.perf_counter_ns() - begin
            result.raise_for_status()
            return taken
        begin = time.perf_counter_ns()
        lease = self._client.reserve(keys)
        taken = time.perf_counter_ns() - begin
        with lease:  # only what was written can be committed; the writing is not what is asked for
            if not lease.granted.all():
                raise MemfabricError(f"reserve granted {int(lease.granted.sum())} of {len(keys)}: {lease.message}")
            lease.write(blocks)
            begin = time.perf_counter_ns()
            result = lease.commit()
            taken += time.perf_counter_ns() - begin
        result.raise_for_status()
        return taken

    def memcpy(self, turn: int) -> int:
        return self._memcpy(turn)

    def socket(self, turn: int) -> int:
        assert self._sockets is not None
        if self.size_bytes:
            return self._sockets.move(self.size_bytes, fetch=self._order.op == "get")
        return self._sockets.round_trips(1 if self._order.op == "match" else 2, self.blocks * KEY_BYTES)

    def close(self) -> None:
        """The blocks go with the namespace."""
        self._client.close()


def _joined(chains: Sequence[BlockKeys]) -> BlockKeys:
    return BlockKeys(
        np.concatenate([chain.keys for chain in chains]), np.concatenate([chain.parents for chain in chains])
    )
