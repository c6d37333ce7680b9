"""The verbs transport against an independent implementation, in both directions."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("pyverbs", reason="Debian's python3-pyverbs is the independent peer; `make test-rdma` brings it")

import pyverbs.enums as e

from tests.rdma.peer import PeerClient, PeerOwner
from transport.base import DENIED, NOT_DONE
from transport.testing.owner import pattern
from transport.testing.suite import after, blocks
from transport.verbs import VerbsTransport

KIB = 1 << 10
SIZE = 256 * KIB


def test_our_client_reads_and_writes_what_pyverbs_lends() -> None:
    memory = pattern(1, SIZE)
    owner = PeerOwner(memory)
    with VerbsTransport() as client:
        handle = client.connect(
            owner.descriptor(),
            writable=True,
            exchange=lambda hello, _end_ns: owner.accept(hello),
            deadline_ns=after(30.0),
        )
        back = np.zeros(SIZE, np.uint8)
        assert client.read(blocks(back, handle, 16 * KIB), after(60.0)) == 16
        assert (back == pattern(1, SIZE)).all()
        data = pattern(2, SIZE)
        assert client.write(blocks(data, handle, 16 * KIB), after(60.0)) == 16
        assert (memory == pattern(2, SIZE)).all()
    owner.drop()


def test_pyverbs_reads_and_writes_what_we_lend() -> None:
    with VerbsTransport(chunk_bytes=64 * KIB) as owner:
        memory = pattern(3, SIZE)
        region = owner.register(memory, 5)
        client = PeerClient(SIZE)
        client.connect(region.descriptor, lambda hello: owner.accept(hello, bytes(16)), writable=True)
        assert len(client.pieces) == 4, "a region of several registrations"
        for at in range(0, SIZE, 32 * KIB):
            assert client.move(False, at, at, 32 * KIB) == e.IBV_WC_SUCCESS
        assert (client.memory == pattern(3, SIZE)).all()
        client.memory[:] = pattern(4, SIZE)
        for at in range(0, SIZE, 32 * KIB):
            assert client.move(True, at, at, 32 * KIB) == e.IBV_WC_SUCCESS
        assert (memory == pattern(4, SIZE)).all()
        region.close()


@pytest.mark.parametrize("case", ["a key of nobody", "past the end", "a reader writes", "a region that was withdrawn"])
def test_what_is_not_allowed_is_refused_by_the_device(case: str) -> None:
    with VerbsTransport() as owner:
        memory = pattern(6, SIZE)
        region = owner.register(memory, 5)
        client = PeerClient(SIZE)
        client.connect(
            region.descriptor, lambda hello: owner.accept(hello, bytes(16)), writable=case != "a reader writes"
        )
        if case == "a reader writes":
            assert client.move(False, 0, 0, 4096) == e.IBV_WC_SUCCESS
        if case == "a region that was withdrawn":
            region.close()
        status = client.move(
            True,
            0,
            SIZE - 64 if case == "past the end" else 0,
            4096,
            key=0x1234567 if case == "a key of nobody" else None,
        )
        assert status in (e.IBV_WC_REM_ACCESS_ERR, e.IBV_WC_REM_INV_REQ_ERR, e.IBV_WC_REM_OP_ERR), status
        assert (memory == pattern(6, SIZE)).all(), "not a byte"
        region.close()


def test_a_stale_key_is_denied_in_words() -> None:
    memory = pattern(7, SIZE)
    owner = PeerOwner(memory)
    owner.told_key = 0x7654321

    with VerbsTransport() as client:
        handle = client.connect(
            owner.descriptor(),
            writable=True,
            exchange=lambda hello, _end_ns: owner.accept(hello),
            deadline_ns=after(30.0),
        )
        data = pattern(8, SIZE)
        batch = blocks(data, handle, SIZE)
        assert client.write(batch, after(30.0)) == 0
        assert batch.error is not None
        assert "stale" in str(batch.error)
        small = blocks(data[: 1 * KIB], handle, 1 * KIB)
        assert client.write(small, after(30.0)) == 0
        assert set(small.status.tolist()) == {DENIED}, "one packet: surely not applied"
        assert (memory == pattern(7, SIZE)).all()
        two = blocks(data[: 2 * KIB], handle, 1 * KIB)
        two.offset[:] = (8 * KIB, 0)
        assert client.write(two, after(30.0)) == 0
        assert two.status.tolist() == [DENIED, NOT_DONE], "what came after the one that was refused did not begin"
        owner.told_key = None
        owner.drop()  # the connection breaks, and the next one comes with the true key
        assert client.write(two, after(30.0)) == 2, two.error
        assert (memory[: 1 * KIB] == data[1 * KIB : 2 * KIB]).all()
    owner.drop()
