"""Servers that restart or hang, nodes that die, frames that are garbage: errors in time, never wrong bytes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

import memfabric
from memfabric import GetStatus, PutStatus
from memfabric.core import messages as m
from memfabric.errors import MemfabricError, OutcomeUnknownError, RefusedError, UnavailableError
from tests.client.conftest import SPEC, blocks, tokens
from tests.client.pool import ProcessPool, ThreadPool, wait_for


@pytest.fixture
def processes(directory: Path, tmp_path: Path) -> Iterator[ProcessPool]:
    """A server and two nodes, each a process."""
    pool = ProcessPool(directory, tmp_path)
    try:
        pool.add_node("n0")
        pool.add_node("n1")
        yield pool
    finally:
        pool.close()


# --- the server restarts -------------------------------------------------------------------------------------


def test_known_places_are_read_while_the_server_is_away(pool: ThreadPool) -> None:
    with pool.connect(create=SPEC, timeout_s=0.5) as client:
        keys, data = client.block_keys(tokens(8)), blocks(8)
        client.put(keys[:5], data[:5])
        pool.stop_server()
        result = client.get(keys[:5])
        assert result.ok and np.array_equal(result.out, data[:5])
        start = time.monotonic()
        with pytest.raises(UnavailableError):
            client.get(keys)
        with pytest.raises(UnavailableError):
            client.put(keys, data)
        assert time.monotonic() - start < 3


def test_a_client_attaches_again_by_itself(pool: ThreadPool) -> None:
    with pool.connect(create=SPEC) as client:
        keys, data = client.block_keys(tokens(8)), blocks(8)
        assert client.put(keys, data).ok
        lease = client.acquire(keys)
        write = client.reserve(client.block_keys(tokens(2, 5)))
        write.write(blocks(2))
        epoch = client.stats()["epoch"]
        time.sleep(1.1)  # epochs without a store are seconds
        pool.restart_server()
        with pytest.raises((RefusedError, OutcomeUnknownError)):
            write.commit()
        lease.release()
        assert client.put(keys, data, wait=True).ok
        assert client.stats()["epoch"] > epoch and client.stats()["attaches"] >= 2
        with pool.connect() as other:
            result = other.get(keys)
            assert result.ok and np.array_equal(result.out, data)


def test_a_put_survives_a_restart_between_reserve_and_commit(pool: ThreadPool) -> None:
    with pool.connect(create=SPEC) as client:
        keys, data = client.block_keys(tokens(20)), blocks(20)
        write = client._engine.transport.write
        restarted = []

        def restart_first(*arguments: object) -> int:
            if not restarted:
                restarted.append(True)
                time.sleep(1.1)
                pool.restart_server()
            return write(*arguments)  # type: ignore[arg-type]

        client._engine.transport.write = restart_first  # type: ignore[method-assign, assignment]
        try:
            result = client.put(keys, data, wait=True, timeout_s=20)
        except OutcomeUnknownError:
            result = client.put(keys, data, wait=True, timeout_s=20)
        assert result.ok
        got = client.get(keys, leased=True)
        assert got.ok and np.array_equal(got.out, data)


@pytest.mark.processes
def test_a_hanging_server_is_a_deadline_and_no_more(processes: ProcessPool) -> None:
    with processes.connect(create=SPEC) as client:
        keys, data = client.block_keys(tokens(6)), blocks(6)
        client.put(keys[:3], data[:3])
        processes.signal("meta", signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(UnavailableError):
            client.match(keys, timeout_s=0.4)
        with pytest.raises(OutcomeUnknownError, match="token: session 0x"):
            client.remove(keys[:1], timeout_s=0.4)
        assert 0.7 < time.monotonic() - start < 3
        assert client.get(keys[1:3]).ok
        processes.signal("meta", signal.SIGCONT)
        wait_for(lambda: client.match(keys[1:3]) in (0, 2))
        assert client.put(keys, data, wait=True).ok
        assert np.array_equal(client.get(keys).out, data)


# --- nodes die -------------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_dead_nodes_blocks_are_misses_soon_and_never_wrong(processes: ProcessPool) -> None:
    with processes.connect(create=SPEC) as client, processes.connect() as reader:
        chains = [(client.block_keys(tokens(6, seed)), blocks(6, seed)) for seed in range(12)]
        for keys, data in chains:
            assert client.put(keys, data).ok
            assert reader.get(keys).ok
        processes.kill("n0")
        end_s = time.monotonic() + 10
        missing = 0
        while missing == 0 or time.monotonic() < end_s - 6:
            assert time.monotonic() < end_s, "the dead node's blocks are still found"
            missing = 0
            for keys, data in chains:
                result = reader.get(keys)
                ok = result.status == GetStatus.OK
                assert np.array_equal(result.out[ok], data[ok])
                missing += int((~ok).sum())
        for keys, data in chains:
            assert client.put(keys, data).ok
            result = reader.get(keys)
            assert result.ok and np.array_equal(result.out, data)
        processes.add_node("n0")


def test_a_node_that_leaves_takes_its_blocks_and_regions(pool: ThreadPool) -> None:
    with pool.connect(create=SPEC) as client:
        chains = [(client.block_keys(tokens(4, seed)), blocks(4, seed)) for seed in range(10)]
        for keys, data in chains:
            client.put(keys, data)
        regions = client.stats()["regions"]
        pool.stop_node("n0")
        wait_for(lambda: client.stats()["regions"] < regions)
        lost = 0
        for keys, data in chains:
            result = client.get(keys)
            ok = result.status == GetStatus.OK
            assert np.array_equal(result.out[ok], data[ok])
            assert (result.status[~ok] == GetStatus.MISSING).all()
            lost += int((~ok).sum())
        assert 0 < lost < 40


def test_regions_of_another_place_are_unreachable_not_wrong(pool: ThreadPool, client: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(4)), blocks(4)
    client.put(keys, data)
    with memfabric.connect(pool.address, namespace="demo", shm_directory="/tmp", transport="shm") as stranger:
        result = stranger.get(keys)
        assert result.status.tolist() == [GetStatus.UNREACHABLE] * 4
        assert "/tmp" in result.message
        with pytest.raises(UnavailableError, match="UNREACHABLE"):
            result.raise_for_status()
        fresh = stranger.block_keys(tokens(2, 9))
        put = stranger.put(fresh, blocks(2))
        assert put.status.tolist() == [PutStatus.UNREACHABLE] * 2 and put.message
        with stranger.acquire(keys) as lease:
            assert lease.read().status.tolist() == [GetStatus.UNREACHABLE] * 4
            with pytest.raises(UnavailableError):
                lease.view(0)
    assert client.put(fresh, blocks(2)).ok, "what could not be written was given back"


# --- under load -------------------------------------------------------------------------------------


@pytest.mark.processes
def test_readers_and_writers_while_everything_is_restarted(processes: ProcessPool) -> None:
    """Every block that is read is one that was put under its key, whatever is killed meanwhile."""
    stop = threading.Event()
    wrong: list[str] = []
    reads = [0]

    def content(number: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return blocks(4, number)

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        with processes.connect(create=SPEC, timeout_s=1.0) as client:
            while not stop.is_set():
                number = int(random.integers(0, 40))
                keys = client.block_keys(tokens(4, number))
                try:
                    if random.random() < 0.4:
                        client.put(keys, content(number))
                    elif random.random() < 0.1:
                        client.remove(keys)
                    else:
                        result = client.get(keys, leased=bool(random.random() < 0.3))
                        ok = result.status == GetStatus.OK
                        if not np.array_equal(result.out[ok], content(number)[ok]):
                            wrong.append(f"chain {number}")
                        reads[0] += int(ok.sum())
                except MemfabricError:
                    pass
                except BaseException as error:
                    wrong.append(repr(error))
                    raise

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    time.sleep(0.5)
    processes.kill("n0")
    time.sleep(0.5)
    processes.kill("meta")
    time.sleep(1.0)
    processes.restart_server()
    time.sleep(1.0)
    processes.signal("n1", signal.SIGSTOP)
    time.sleep(2.5)
    processes.signal("n1", signal.SIGCONT)
    processes.add_node("n2")
    time.sleep(1.5)
    stop.set()
    for worker in workers:
        worker.join(20)
        assert not worker.is_alive(), "a call hangs"
    assert wrong == []
    assert reads[0] > 100


# --- garbage -------------------------------------------------------------------------------------


class FakeServer:
    """Answers every frame with what it is told to."""

    def __init__(self, answer: bytes) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.address = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"
        self.answer = answer
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        while not self.stop.is_set():
            if self.socket.poll(20):
                peer = self.socket.recv_multipart()[0]
                self.socket.send_multipart([peer, self.answer])

    def close(self) -> None:
        self.stop.set()
        self.thread.join()
        self.context.destroy(linger=0)


@pytest.mark.parametrize("answer", [b"", b"garbage", b"MF\x01R\xc1", b"MF\x01Q\x80", os.urandom(500)])
def test_a_server_that_talks_garbage_is_no_server(answer: bytes) -> None:
    server = FakeServer(answer)
    try:
        with pytest.raises(UnavailableError):
            memfabric.connect(server.address, namespace="x", timeout_s=0.4)
    finally:
        server.close()


def test_a_server_of_another_version_is_named() -> None:
    server = FakeServer(b"MF\x63R\x80")
    try:
        with pytest.raises(RefusedError, match="version 99, this program speaks 1") as caught:
            memfabric.connect(server.address, namespace="x", timeout_s=5)
        assert caught.value.code == "version"
    finally:
        server.close()


def test_forged_events_and_replies_are_ignored(pool: ThreadPool, client: memfabric.Client) -> None:
    keys, data = client.block_keys(tokens(3)), blocks(3)
    client.put(keys, data)
    engine = client._engine
    engine.on_removed(b"not a multiple of sixteen")
    empty = m.View(epoch=0, version=0, namespace="demo", nodes=[], regions=[])
    engine.on_view(empty)
    foreign = m.View(epoch=2**40, version=1, namespace="other", nodes=[], regions=[])
    engine.on_view(foreign)
    assert client.get(keys).optimistic_count == 3
