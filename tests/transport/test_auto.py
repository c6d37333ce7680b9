"""Several transports behind one: what is chosen, that it stays chosen, and mixed batches."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import transport
from transport import registry
from transport.auto import AutoTransport, Choice, combine, take_apart
from transport.base import DONE, NOT_DONE, NOT_WRITABLE, OUT_OF_BOUNDS, REGION_GONE, Batch
from transport.errors import (
    BoundsError,
    DescriptorError,
    NotConnectedError,
    NotWritableError,
    UnreachableError,
    UnsupportedError,
)
from transport.testing.owner import OwnerProcess, pattern
from transport.testing.suite import KIB, after, operations

pytest.importorskip("libucx", reason="UCX's libraries are not installed (extra `ucx`)")
UCX = {"tls": "tcp,self", "addresses": ["127.0.0.1"]}
CLIENT = {"ucx": {"tls": "tcp,self"}}
A, B = b"a" * 16, b"b" * 16
SIZE = 64 * KIB


@pytest.fixture
def shm() -> Iterator[OwnerProcess]:
    with OwnerProcess("transport.shm:ShmTransport", {}) as made:
        yield made


@pytest.fixture
def ucx() -> Iterator[OwnerProcess]:
    with OwnerProcess("transport.ucx:UcxTransport", UCX) as made:
        yield made


def test_the_best_that_reaches_is_chosen_and_explained(shm: OwnerProcess, ucx: OwnerProcess) -> None:
    told: list[Choice] = []
    both = combine(A, [("ucx", ucx.create(1, SIZE, seed=1)), ("shm", shm.create(1, SIZE, seed=1))])
    only_ucx = combine(B, [("ucx", ucx.create(2, SIZE, seed=2))])
    with AutoTransport(options=CLIENT, on_choice=told.append) as client:
        client.connect(both, writable=True)
        client.connect(only_ucx, writable=True)
        first, second = client.choices()
        assert told == [first, second]
        assert (first.owner, first.transport, first.instead_of) == (A, "shm", {})
        assert (second.owner, second.transport) == (B, "ucx")
        assert second.instead_of["shm"] == "the owner does not lend over it"
        assert any(key.startswith("ucx.") for key in client.stats())


def test_where_the_best_does_not_reach_the_next_is_taken_and_says_why(shm: OwnerProcess, ucx: OwnerProcess) -> None:
    gone = shm.create(1, SIZE)
    shm.close_region(1)
    with AutoTransport(options=CLIENT) as client:
        client.connect(combine(A, [("shm", gone), ("ucx", ucx.create(1, SIZE))]), writable=True)
        (choice,) = client.choices()
        assert choice.transport == "ucx"
        assert "does not exist" in choice.instead_of["shm"]


def test_advice_reaches_transports_that_are_made_later(shm: OwnerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[tuple[str, int, int]] = []

    class Noting(transport.ShmTransport):
        def prepare(self, address: int, length: int) -> None:
            noted.append(("prepare", address, length))

        def forget(self, address: int, length: int) -> None:
            noted.append(("forget", address, length))

    monkeypatch.setattr(registry, "create", lambda _name, **options: Noting(**options))
    with AutoTransport() as client:
        client.prepare(4096, 100)
        client.prepare(4096, 100)
        client.prepare(8192, 7)
        client.forget(8192, 7)
        assert not noted, "there is no transport yet"
        client.connect(combine(A, [("shm", shm.create(1, SIZE))]), writable=False)
        assert noted == [("prepare", 4096, 100)] * 2
        client.forget(4096, 100)
        assert len(noted) == 2, "somebody else's advice stands"
        client.forget(4096, 100)
        assert noted[2:] == [("forget", 4096, 100)]


def test_a_choice_is_never_changed(shm: OwnerProcess, ucx: OwnerProcess) -> None:
    """Also where the other would work: silently slower is worse than an error."""
    first = combine(A, [("shm", shm.create(1, SIZE)), ("ucx", ucx.create(1, SIZE))])
    gone = shm.create(2, SIZE)
    shm.close_region(2)
    second = combine(A, [("shm", gone), ("ucx", ucx.create(2, SIZE))])
    with AutoTransport(options=CLIENT) as client:
        client.connect(first, writable=True)
        with pytest.raises(UnreachableError, match="does not exist"):
            client.connect(second, writable=True)
        with pytest.raises(UnreachableError, match="not lent over shm"):
            client.connect(combine(A, [("ucx", ucx.create(3, SIZE))]), writable=True)
        assert [choice.transport for choice in client.choices()] == ["shm"]


def test_named_transports_are_the_only_ones(shm: OwnerProcess, ucx: OwnerProcess) -> None:
    both = combine(A, [("shm", shm.create(1, SIZE)), ("ucx", ucx.create(1, SIZE))])
    with AutoTransport(["ucx"], CLIENT) as client:
        client.connect(both, writable=True)
        assert client.capabilities.name == "ucx"
    with AutoTransport(["shm"]) as client, pytest.raises(UnreachableError, match="lends over ucx"):
        client.connect(combine(A, [("ucx", ucx.create(2, SIZE))]), writable=True)
    with pytest.raises(UnsupportedError, match="nowhere"):
        AutoTransport(["ucx"], {"ucx": {"library": "/nowhere.so"}})


def test_what_cannot_be_used_here_is_no_obstacle_unless_it_is_needed(shm: OwnerProcess, ucx: OwnerProcess) -> None:
    with AutoTransport(options={"ucx": {"library": "/nowhere.so"}}) as client:
        client.connect(combine(A, [("shm", shm.create(1, SIZE))]), writable=True)
        with pytest.raises(UnreachableError, match=r"nowhere\.so"):
            client.connect(combine(B, [("ucx", ucx.create(1, SIZE))]), writable=True)


class Mixed:
    """A client with two regions in shared memory and one over UCX."""

    def __init__(self, client: AutoTransport, shm: OwnerProcess, ucx: OwnerProcess) -> None:
        self.client = client
        self.handles = [
            client.connect(combine(A, [("shm", shm.create(1, SIZE, seed=1))]), writable=True),
            client.connect(combine(B, [("ucx", ucx.create(2, SIZE, seed=2))]), writable=True),
            client.connect(combine(A, [("shm", shm.create(3, SIZE, seed=3))]), writable=False),
        ]

    def batch(self, buffer: Any, rows: list[tuple[int, int, int, int]], groups: list[int] | None = None) -> Batch:
        made = operations(buffer, 0, [row[1:] for row in rows], groups)
        made.region[:] = [self.handles[row[0]] for row in rows]
        return made


@pytest.fixture
def mixed(shm: OwnerProcess, ucx: OwnerProcess) -> Iterator[Mixed]:
    with AutoTransport(options=CLIENT) as client:
        yield Mixed(client, shm, ucx)


def test_mixed_batches(mixed: Mixed, shm: OwnerProcess, ucx: OwnerProcess) -> None:
    assert len(set(mixed.handles)) == 3
    buffer = np.zeros(4 * SIZE, np.uint8)
    rows = [(0, 0, 10, 1000), (1, 1000, 20, 3000), (2, 4000, 30, 500), (1, 5000, 0, SIZE), (0, 80_000, 7, 1)]
    batch = mixed.batch(buffer, rows, groups=[0, 0, 1, -1, 2])
    assert mixed.client.read(batch, after(20)) == 5
    assert batch.status.tolist() == [DONE] * 5
    want = [pattern(seed, SIZE) for seed in (1, 2, 3)]
    for which, local, remote, length in rows:
        assert (buffer[local : local + length] == want[which][remote : remote + length]).all()
    assert batch.digest is not None
    pieces = [want[which][remote : remote + length] for which, _, remote, length in rows]
    assert int(batch.digest[0]) == transport.digest(np.concatenate(pieces[:2]))
    assert int(batch.digest[1]) == transport.digest(np.ascontiguousarray(pieces[2]))
    data = pattern(9, 2 * SIZE)
    pending = mixed.client.post_write(mixed.batch(data, [(1, 0, 5, 999), (0, 999, 5, 999)]), after(20))
    assert pending.wait() == 2
    assert pending.poll()
    assert (ucx.bytes_of(2, 5, 999) == data[:999]).all()
    assert (shm.bytes_of(1, 5, 999) == data[999:1998]).all()


def test_a_bad_operation_gets_the_whole_mixed_batch_refused(mixed: Mixed, ucx: OwnerProcess) -> None:
    before = ucx.digest_of(2)
    data = pattern(10, SIZE)
    good = (1, 0, 0, 100)
    for bad, status, error in (
        ((0, 0, SIZE - 5, 10), OUT_OF_BOUNDS, BoundsError),
        ((2, 0, 0, 10), NOT_WRITABLE, NotWritableError),
    ):
        batch = mixed.batch(data, [good, bad, good])
        with pytest.raises(error, match="operation 1 of 3"):
            mixed.client.write(batch, after(20))
        assert batch.status.tolist() == [NOT_DONE, status, NOT_DONE]
    batch = mixed.batch(data, [good, good])
    batch.region[1] = 77
    with pytest.raises(NotConnectedError):
        mixed.client.write(batch, after(20))
    assert batch.status.tolist() == [NOT_DONE, REGION_GONE]
    batch = mixed.batch(data, [good, good])
    batch.local[1] = 0
    with pytest.raises(BoundsError):
        mixed.client.write(batch, after(20))
    assert ucx.digest_of(2) == before


def test_one_owner_that_is_gone_does_not_fail_the_other(mixed: Mixed, ucx: OwnerProcess) -> None:
    ucx.kill()
    buffer = np.zeros(SIZE, np.uint8)
    batch = mixed.batch(buffer, [(0, 0, 0, 100), (1, 100, 0, 100), (2, 200, 0, 100)])
    assert mixed.client.read(batch, after(3)) == 2
    assert batch.status[0] == batch.status[2] == DONE != batch.status[1]
    assert batch.error is not None
    assert (buffer[:100] == pattern(1, SIZE)[:100]).all()


def test_disconnected_handles_are_refused_and_their_numbers_used_again(mixed: Mixed, shm: OwnerProcess) -> None:
    client, handle = mixed.client, mixed.handles[1]
    client.disconnect(handle)
    with pytest.raises(NotConnectedError):
        client.disconnect(handle)
    assert client.size_of(handle) == 0
    again = client.connect(combine(A, [("shm", shm.create(9, 4096, seed=9))]), writable=True)
    buffer = np.zeros(100, np.uint8)
    assert client.read(operations(buffer, again, [(0, 5, 100)]), after(20)) == 1
    assert (buffer == pattern(9, 4096)[5:105]).all()
    assert client.zero_copy(again)
    assert (client.mapped(again) == pattern(9, 4096)).all()


# --- descriptors and names ---


@given(st.binary(max_size=200))
def test_garbage_is_no_combined_descriptor(raw: bytes) -> None:
    with pytest.raises(DescriptorError):
        take_apart(raw)


@given(st.lists(st.tuples(st.text(max_size=20), st.binary(max_size=300)), min_size=1, max_size=8))
def test_combined_descriptors_come_apart_again(parts: list[tuple[str, bytes]]) -> None:
    owner, found = take_apart(combine(A, parts))
    assert owner == A
    assert found == dict(parts)


def test_too_many_or_too_large_parts_are_refused() -> None:
    with pytest.raises(DescriptorError):
        take_apart(combine(A, [(str(n), b"") for n in range(9)]))
    with pytest.raises(DescriptorError):
        take_apart(combine(A, [("x", bytes(5000))]))
    with pytest.raises(DescriptorError):
        take_apart(combine(b"short", [("x", b"")]))


def test_unknown_names_are_refused_with_those_that_exist() -> None:
    with pytest.raises(UnsupportedError, match="shm, verbs, ucx"):
        registry.create("pigeon")
    assert registry.why_not("shm") == ""
    assert "no transport" in registry.why_not("pigeon")


def test_third_parties_bring_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        metadata.EntryPoint("theirs", "transport.shm:ShmTransport", registry.GROUP),
        metadata.EntryPoint("broken", "no.such.module:Thing", registry.GROUP),
        metadata.EntryPoint("wrong", "os:getcwd", registry.GROUP),
        metadata.EntryPoint("shm", "os:getcwd", registry.GROUP),  # this package's own names stay
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)
    registry._others.cache_clear()
    try:
        assert registry.names()[-3:] == ["broken", "theirs", "wrong"]
        assert isinstance(registry.create("theirs"), transport.ShmTransport)
        assert isinstance(registry.create("shm"), transport.ShmTransport)
        assert "no.such" in registry.why_not("broken") or "No module" in registry.why_not("broken")
        assert "not a transport" in registry.why_not("wrong")
    finally:
        monkeypatch.undo()
        registry._others.cache_clear()


def test_importing_the_package_loads_no_fabric() -> None:
    code = "import sys, transport; assert not {'transport.ucx', 'transport._ucx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])
