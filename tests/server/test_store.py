"""The embedded file store and the server's options."""

from __future__ import annotations

from pathlib import Path

import pytest

from memfabric.core.messages import NamespaceSpec
from memfabric.errors import UnavailableError, UsageError
from memfabric.server import Server, ServerOptions
from memfabric.server.store import FileStore

SPECS = (NamespaceSpec(name="a", block_bytes=4096), NamespaceSpec(name="b", block_bytes=8192, policy="ttl", ttl_ns=5))


def test_namespaces_survive_and_the_epoch_rises_even_if_the_clock_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path / "state")
    first = store.epoch
    store.save(SPECS)
    store.close()
    monkeypatch.setattr("time.time", lambda: 0.0)
    again = FileStore(tmp_path / "state")
    assert again.epoch > first
    assert again.namespaces == SPECS
    again.close()


def test_two_servers_cannot_share_a_directory(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with pytest.raises(UnavailableError, match="another metadata server"):
        FileStore(tmp_path)
    store.close()
    FileStore(tmp_path).close()


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'{"epoch": "x", "namespaces": []}', b"\xff\xfe"])
def test_a_damaged_store_is_refused_and_left_as_it_is(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "server.json").write_bytes(raw)
    with pytest.raises(UsageError, match=r"server\.json"):
        FileStore(tmp_path)
    assert (tmp_path / "server.json").read_bytes() == raw
    (tmp_path / "server.json").unlink()
    FileStore(tmp_path).close()  # the refused attempt holds no lock


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("address", "localhost:1", "not understood"),
        ("address", "tcp://host", "not understood"),
        ("address", "tcp://127.0.0.1:99999", "not understood"),
        ("address", "tcp://0.0.0.0:7170", "other hosts"),
        ("address", "tcp://192.0.2.1:7170", "other hosts"),
        ("address", "tcp://*:7170", "other hosts"),
        ("dead_ns", 600_000_000, "at least twice"),
        ("heartbeat_ns", 0, "positive"),
        ("quarantine_ns", -1, "positive"),
    ],
)
def test_impossible_options_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ServerOptions(**{field: value}).check()  # type: ignore[arg-type]


def test_insecure_addresses_must_be_asked_for() -> None:
    ServerOptions(address="tcp://0.0.0.0:7170", insecure=True).check()
    for address in ("tcp://127.0.0.9:0", "tcp://[::1]:7170", "tcp://localhost:*", "ipc:///tmp/pool"):
        ServerOptions(address=address).check()


def test_a_taken_port_is_said_at_once_and_frees_the_directory(tmp_path: Path) -> None:
    first = Server(ServerOptions(address="tcp://127.0.0.1:0"))
    try:
        with pytest.raises(UnavailableError, match="another server"):
            Server(ServerOptions(address=first.address, state_dir=tmp_path))
        FileStore(tmp_path).close()
    finally:
        first.stop()
        first.run()
