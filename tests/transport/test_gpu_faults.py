"""Staged batches over UCX whose other side dies, hangs or withdraws its region in the middle."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.transport.conftest import random_bytes
from transport import digest, registry
from transport.base import DENIED, DONE, NOT_DONE, PEER_LOST, TIMED_OUT, Batch, Transport
from transport.errors import NotConnectedError, TransportError
from transport.gpu import HostDevice, Stager, parts
from transport.testing.owner import OwnerProcess, pattern

SIZE = 16 << 20
COUNT = 256
EACH = SIZE // COUNT


@pytest.fixture
def owner() -> Iterator[OwnerProcess]:
    why = registry.why_not("ucx")
    if why:
        pytest.skip(why)
    with OwnerProcess("transport.ucx:UcxTransport", {"tls": "tcp,self", "addresses": ["127.0.0.1"]}) as made:
        yield made


def moves(handle: int, memory: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Batch:
    """All of the region, in blocks that lie in reverse order in "device" memory."""
    at = np.arange(COUNT, dtype=np.uint64) * np.uint64(EACH)
    return Batch(
        at[::-1] + np.uint64(memory.ctypes.data),
        np.full(COUNT, handle, np.int32),
        at,
        np.full(COUNT, EACH, np.uint64),
        np.arange(COUNT, dtype=np.int32),
        np.zeros(COUNT, np.uint64),
        kind="cuda",
    )


@pytest.mark.parametrize("fault", ["kill", "freeze", "withdraw"])
@pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
def test_the_other_side_fails_in_the_middle(owner: OwnerProcess, fault: str, write: bool) -> None:
    draw = random.Random(7)
    begun = threading.Event()

    def hook() -> None:
        begun.set()
        time.sleep(draw.choice([0, 0.001]))

    device = HostDevice(hook)
    transport: Transport = registry.create("ucx", tls="tcp,self")
    with transport:
        handle = transport.connect(owner.create(1, SIZE, seed=3), writable=True)
        stager = Stager(transport, device, part_bytes=parts.MIN_PART_BYTES)
        memory = random_bytes(SIZE, 4)
        batch = moves(handle, memory)
        inject: Callable[[], object] = {
            "kill": owner.kill,
            "freeze": owner.freeze,
            "withdraw": lambda: owner.close_region(1),
        }[fault]

        def later() -> None:
            begun.wait(20)
            time.sleep(0.05)
            inject()

        thread = threading.Thread(target=later)
        thread.start()
        try:
            done = COUNT
            end_s = time.monotonic() + 60
            while done == COUNT and time.monotonic() < end_s:
                memory[:] = random_bytes(SIZE, 4)
                try:
                    done = (stager.write if write else stager.read)(batch, time.monotonic_ns() + 3_000_000_000)
                except NotConnectedError:  # refused whole: it was known before the batch began
                    assert fault == "withdraw" and np.array_equal(memory, random_bytes(SIZE, 4))
                    return
            assert done < COUNT, "the fault was never felt"
            thread.join()
            assert set(batch.status.tolist()) <= {DONE, NOT_DONE, PEER_LOST, DENIED, TIMED_OUT}
            assert isinstance(batch.error, TransportError)
            good = np.nonzero(batch.status == DONE)[0]
            assert batch.digest is not None and not batch.digest[batch.status != DONE].any()
            source = random_bytes(SIZE, 4) if write else pattern(3, SIZE)
            for i in good.tolist():
                landed = memory[(COUNT - 1 - i) * EACH :][:EACH]
                expected = source[(COUNT - 1 - i) * EACH :][:EACH] if write else source[i * EACH :][:EACH]
                assert np.array_equal(landed, expected) and batch.digest[i] == digest(expected)
            seen = memory.copy()
            if fault == "freeze":
                owner.thaw()
            time.sleep(0.2)
            assert np.array_equal(seen, memory), "memory changed after the call had ended"
            if fault == "freeze":  # the same stager works again
                end_s = time.monotonic() + 30
                while (stager.read(batch, time.monotonic_ns() + 5_000_000_000)) != COUNT:
                    assert time.monotonic() < end_s, str(batch.error)
        finally:
            thread.join()
            stager.close()
    device.close()
