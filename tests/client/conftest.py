"""Fixtures: a pool in this process, in a private directory of shared memory that must be empty again at the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import memfabric
from memfabric import NamespaceSpec
from tests.client.pool import ThreadPool

BLOCK_BYTES = 16 << 10
SPEC = NamespaceSpec(name="demo", block_bytes=BLOCK_BYTES, block_tokens=16, segments=4)


@pytest.fixture
def pool(directory: Path) -> Iterator[ThreadPool]:
    """A server and two nodes of 16 MiB."""
    pool = ThreadPool(directory)
    try:
        pool.add_node("n0")
        pool.add_node("n1")
        yield pool
    finally:
        pool.close()


@pytest.fixture
def client(pool: ThreadPool) -> Iterator[memfabric.Client]:
    """A client of the namespace `demo`."""
    with pool.connect(create=SPEC) as client:
        yield client


@pytest.fixture
def other(pool: ThreadPool, client: memfabric.Client) -> Iterator[memfabric.Client]:
    """A second client of the same namespace."""
    with pool.connect() as other:
        yield other


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """Every client and pool of a test ends its threads."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive(), f"{thread.name} was left running"


def blocks(count: int, seed: int = 0, block_bytes: int = BLOCK_BYTES) -> npt.NDArray[np.uint8]:
    """Random contents ``[count, block_bytes]``."""
    return np.random.default_rng(seed).integers(0, 256, (count, block_bytes), dtype=np.uint8)


def tokens(count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """A prompt of `count` whole blocks."""
    return np.random.default_rng(seed + 1000).integers(0, 50_000, 16 * count)
