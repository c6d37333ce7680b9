"""What is UCX's own: its binary interface, which library is taken, forks, clients that are killed. The rest is in the
conformance suite."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from transport import _ucx_library
from transport.errors import DescriptorError, TransportError, UnreachableError, UnsupportedError
from transport.testing import OwnerProcess
from transport.testing.owner import pattern
from transport.testing.suite import KIB, MIB, after, blocks, operations
from transport.ucx import UcxTransport, host_addresses

libucx = pytest.importorskip("libucx", reason="UCX's libraries are not installed (extra `ucx`)")
INCLUDE = Path(next(iter(libucx.__path__)), "include")
NATIVE = Path(__file__).parents[2] / "transport/native/ucx"

# Ours: (struct, field, UCX's struct, UCX's field).
STRUCTS = {
    "Params": ("ucp_params_t", "field_mask features request_size tag_sender_mask mt_workers_shared name"),
    "WorkerParams": ("ucp_worker_params_t", "field_mask thread_mode cpu_mask events user_data event_fd flags name"),
    "SocketAddress": ("ucs_sock_addr_t", "address=addr length=addrlen"),
    "EndpointParams": (
        "ucp_ep_params_t",
        "field_mask address error_mode=err_mode error_handler=err_handler user_data flags remote=sockaddr "
        "request=conn_request name local=local_sockaddr",
    ),
    "ListenerParams": (
        "ucp_listener_params_t",
        "field_mask address=sockaddr accept_handler connection_handler=conn_handler",
    ),
    "ListenerAttributes": ("ucp_listener_attr_t", "field_mask address=sockaddr"),
    "MapParams": (
        "ucp_mem_map_params_t",
        "field_mask address length flags protection=prot memory_type exported=exported_memh_buffer",
    ),
    "RequestParam": (
        "ucp_request_param_t",
        "mask=op_attr_mask flags request callback=cb datatype user_data reply_buffer memory_type recv_info memory=memh",
    ),
    "AmReceiveParam": ("ucp_am_recv_param_t", "mask=recv_attr reply=reply_ep"),
    "AmHandlerParam": ("ucp_am_handler_param_t", "field_mask id flags callback=cb argument=arg"),
    "TransportEntry": ("ucp_transport_entry_t", "transport=transport_name device=device_name"),
    "EndpointAttributes": (
        "ucp_ep_attr_t",
        "field_mask name local=local_sockaddr remote=remote_sockaddr transports user_data",
    ),
}
CONSTANTS = {
    "kOk": "UCS_OK", "kInProgress": "UCS_INPROGRESS", "kNoMemory": "UCS_ERR_NO_MEMORY", "kBusy": "UCS_ERR_BUSY",
    "kUnreachable": "UCS_ERR_UNREACHABLE", "kInvalidAddress": "UCS_ERR_INVALID_ADDR", "kCanceled": "UCS_ERR_CANCELED",
    "kExceedsLimit": "UCS_ERR_EXCEEDS_LIMIT", "kUnsupported": "UCS_ERR_UNSUPPORTED", "kRejected": "UCS_ERR_REJECTED",
    "kNotConnected": "UCS_ERR_NOT_CONNECTED", "kConnectionReset": "UCS_ERR_CONNECTION_RESET",
    "kEndpointTimeout": "UCS_ERR_ENDPOINT_TIMEOUT", "kLast": "UCS_ERR_LAST", "kFeatureRma": "UCP_FEATURE_RMA",
    "kFeatureWakeup": "UCP_FEATURE_WAKEUP", "kFeatureAm": "UCP_FEATURE_AM",
    "kParamFeatures": "UCP_PARAM_FIELD_FEATURES", "kParamMtWorkersShared": "UCP_PARAM_FIELD_MT_WORKERS_SHARED",
    "kParamName": "UCP_PARAM_FIELD_NAME", "kWorkerThreadMode": "UCP_WORKER_PARAM_FIELD_THREAD_MODE",
    "kWorkerFlags": "UCP_WORKER_PARAM_FIELD_FLAGS", "kWorkerIgnoreRequestLeak": "UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK",
    "kThreadSerialized": "UCS_THREAD_MODE_SERIALIZED", "kEpErrorMode": "UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE",
    "kEpErrorHandler": "UCP_EP_PARAM_FIELD_ERR_HANDLER", "kEpSocketAddress": "UCP_EP_PARAM_FIELD_SOCK_ADDR",
    "kEpFlags": "UCP_EP_PARAM_FIELD_FLAGS", "kEpConnectionRequest": "UCP_EP_PARAM_FIELD_CONN_REQUEST",
    "kEpClientServer": "UCP_EP_PARAMS_FLAGS_CLIENT_SERVER", "kErrorModePeer": "UCP_ERR_HANDLING_MODE_PEER",
    "kCloseForce": "UCP_EP_CLOSE_FLAG_FORCE", "kListenerAddress": "UCP_LISTENER_PARAM_FIELD_SOCK_ADDR",
    "kListenerConnectionHandler": "UCP_LISTENER_PARAM_FIELD_CONN_HANDLER",
    "kMapAddress": "UCP_MEM_MAP_PARAM_FIELD_ADDRESS", "kMapLength": "UCP_MEM_MAP_PARAM_FIELD_LENGTH",
    "kMapMemoryType": "UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE", "kOpCallback": "UCP_OP_ATTR_FIELD_CALLBACK",
    "kOpUserData": "UCP_OP_ATTR_FIELD_USER_DATA", "kOpFlags": "UCP_OP_ATTR_FIELD_FLAGS",
    "kOpMemoryType": "UCP_OP_ATTR_FIELD_MEMORY_TYPE", "kOpMemory": "UCP_OP_ATTR_FIELD_MEMH",
    "kAmId": "UCP_AM_HANDLER_PARAM_FIELD_ID", "kAmFlags": "UCP_AM_HANDLER_PARAM_FIELD_FLAGS",
    "kAmCallback": "UCP_AM_HANDLER_PARAM_FIELD_CB", "kAmArgument": "UCP_AM_HANDLER_PARAM_FIELD_ARG",
    "kAmWholeMessage": "UCP_AM_FLAG_WHOLE_MSG", "kAmSendEager": "UCP_AM_SEND_FLAG_EAGER",
    "kEpTransports": "UCP_EP_ATTR_FIELD_TRANSPORTS",
}  # fmt: skip


def checker() -> str:
    """A translation unit that compiles only if our declarations are UCX's."""
    lines = ["#include <ucp/api/ucp.h>", '#include "abi.hpp"', "namespace ours = mf::ucp;"]
    for ours, (theirs, fields) in STRUCTS.items():
        for pair in fields.split():
            mine, _, other = pair.partition("=")
            where = f"offsetof(ours::{ours}, {mine}) == offsetof({theirs}, {other or mine})"
            size = f"sizeof(ours::{ours}::{mine}) == sizeof({theirs}::{other or mine})"
            lines.append(f'static_assert({where} && {size}, "{ours}.{mine}");')
    for ours, theirs in CONSTANTS.items():
        lines.append(f'static_assert(static_cast<long>(ours::{ours}) == static_cast<long>({theirs}), "{ours}");')
    lines.append("static_assert(sizeof(ours::Status) == sizeof(ucs_status_t));")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("broken", [False, True])
def test_declarations_are_those_of_the_library(tmp_path: Path, broken: bool) -> None:
    source = checker()
    if broken:  # the checker does check
        source = source.replace("ours::Params, name) ==", "ours::Params, name) + 8 ==")
    unit = tmp_path / "check.cpp"
    unit.write_text(source)
    command = ["c++", "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", f"-I{INCLUDE}", f"-I{NATIVE}", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) is not broken, done.stderr[-3000:]


def test_every_declared_field_and_constant_is_checked() -> None:
    declared = (NATIVE / "abi.hpp").read_text()
    for name in CONSTANTS:
        assert name in declared
    constants = {word.strip("=,;") for word in declared.split() if word.startswith("k") and word[1:2].isupper()}
    assert constants <= set(CONSTANTS), constants - set(CONSTANTS)


# --- which library ---


def test_a_path_that_is_no_libucp_is_an_error_that_names_it(tmp_path: Path) -> None:
    for path in (str(tmp_path / "nothing.so"), "libc.so.6"):
        with pytest.raises(UnsupportedError, match=path.replace(".", r"\.")):
            UcxTransport(library=path)


def test_the_environment_names_a_library_and_nothing_else_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_ucx_library.VARIABLE, "/nowhere/libucp.so.0")
    with pytest.raises(UnsupportedError, match="nowhere"):
        UcxTransport()
    wheel = str(Path(next(iter(libucx.__path__)), "lib", _ucx_library.SONAME))
    monkeypatch.setenv(_ucx_library.VARIABLE, wheel)
    with UcxTransport() as made:
        assert made.info()["library"] == wheel
        assert made.info()["source"] == f"${_ucx_library.VARIABLE}"
        assert made.info()["version"].count(".") == 2
        assert "tcp" in made.info()["transports"]


def test_without_any_library_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ucx_library, "candidates", lambda _explicit=None: [])
    with pytest.raises(UnsupportedError, match=r"memfabric\[ucx\]"):
        UcxTransport()


@pytest.mark.parametrize("options", [{"lanes": 0}, {"lanes": 17}, {"port": 70000}, {"limit_ns": 0}])
def test_impossible_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        UcxTransport(**options)  # type: ignore[arg-type]


def test_an_unknown_setting_or_transport_is_named() -> None:
    with pytest.raises(UnsupportedError, match="NO_SUCH_SETTING"):
        UcxTransport(settings={"NO_SUCH_SETTING": "1"})
    with pytest.raises(UnsupportedError):
        UcxTransport(tls="carrier_pigeon")
    with pytest.raises(ValueError, match="address"):
        UcxTransport(addresses=["localhost"])


def test_importing_costs_nothing_and_needs_nothing() -> None:
    code = "import sys, transport.ucx; assert 'transport._ucx' not in sys.modules; assert 'libucx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])


def test_nothing_is_printed_on_standard_output() -> None:
    code = "from transport.ucx import UcxTransport\nwith UcxTransport(tls='tcp') as t: t.create_region('n', 1, 4096)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "UCX_LOG_LEVEL": "info"}, capture_output=True, text=True,
        timeout=60, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "UCX" in done.stderr


def test_own_addresses_are_numeric_and_not_the_loopback_unless_alone() -> None:
    found = host_addresses()
    assert found
    assert found == ["127.0.0.1"] or not any(each.startswith("127.") for each in found)


# --- with an owner ---


@pytest.fixture
def owner() -> Iterator[OwnerProcess]:
    options = {"tls": "tcp,self", "addresses": ["127.0.0.1"]}
    with OwnerProcess("transport.ucx:UcxTransport", options) as made:
        yield made


CLIENT = """
import sys
import numpy as np
from transport.testing.suite import MIB, KIB, after, blocks
from transport.ucx import UcxTransport
client = UcxTransport(tls="tcp,self")
handle = client.connect(bytes.fromhex(sys.argv[1]), writable=True)
buffer = np.zeros(8 * MIB, np.uint8)
print("ready", flush=True)
while True:
    for call in (client.read, client.write):
        batch = blocks(buffer, handle, 256 * KIB)
        assert call(batch, after(30)) == len(batch), batch.error
"""


def test_clients_that_are_killed_during_transfers_leave_nothing_at_the_owner(owner: OwnerProcess) -> None:
    """With UCX's own emulation of get over TCP this ended the owner."""
    descriptor = owner.create(1, 8 * MIB, seed=1)
    for wait_s in (0.02, 0.1, 0.05):
        command = [sys.executable, "-c", CLIENT, descriptor.hex()]
        clients = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) for _ in range(3)]
        try:
            for each in clients:
                assert each.stdout is not None
                assert each.stdout.readline() == b"ready\n"
            time.sleep(wait_s)
        finally:
            for each in clients:
                each.kill()
                each.wait()
    end_s = time.monotonic() + 30
    while owner.ask("stats")["stats"]["clients"] and time.monotonic() < end_s:
        time.sleep(0.05)
    stats = owner.ask("stats")["stats"]
    assert stats["clients"] == 0, stats
    assert stats["clients_accepted"] == 9
    with UcxTransport(tls="tcp,self") as client:
        handle = client.connect(descriptor, writable=False)
        assert client.read(operations(np.zeros(8, np.uint8), handle, [(0, 0, 8)]), after(20)) == 1
    assert owner.close() == 0


def test_a_frozen_client_does_not_hold_up_others(owner: OwnerProcess) -> None:
    descriptor = owner.create(1, 8 * MIB, seed=2)
    command = [sys.executable, "-c", CLIENT, descriptor.hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as frozen:
        try:
            assert frozen.stdout is not None
            frozen.stdout.readline()
            time.sleep(0.1)
            frozen.send_signal(signal.SIGSTOP)
            other = owner.create(2, MIB, seed=3)
            with UcxTransport(tls="tcp,self") as client:
                handle = client.connect(other, writable=True)
                buffer = np.zeros(MIB, np.uint8)
                for _ in range(5):
                    assert client.read(blocks(buffer, handle, 64 * KIB), after(20)) == 16
                    assert (buffer == pattern(3, MIB)).all()
        finally:
            frozen.kill()


def test_a_forked_child_cannot_use_it_and_does_the_parent_no_harm(owner: OwnerProcess) -> None:
    descriptor = owner.create(1, MIB, seed=4)
    with UcxTransport(tls="tcp,self") as client:
        handle = client.connect(descriptor, writable=True)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                client.read(operations(np.zeros(8, np.uint8), handle, [(0, 0, 8)]), after(1))
            except TransportError as error:
                code = 0 if "fork" in str(error) else 2
            client.close()
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        buffer = np.zeros(MIB, np.uint8)
        assert client.read(blocks(buffer, handle, 64 * KIB), after(20)) == 16
        assert (buffer == pattern(4, MIB)).all()


def test_no_owner_at_the_address_is_said_in_time(owner: OwnerProcess) -> None:
    descriptor = owner.create(1, 4096)
    owner.kill()
    with UcxTransport(tls="tcp,self") as client:
        begun_s = time.monotonic()
        with pytest.raises(UnreachableError, match=r"127\.0\.0\.1 port"):
            client.connect(descriptor, writable=False, deadline_ns=after(3))
        assert time.monotonic() - begun_s < 20


def test_an_owner_that_accepts_and_hangs_is_given_up_at_the_deadline(owner: OwnerProcess) -> None:
    descriptor = owner.create(1, 4096)
    owner.freeze()
    try:
        with UcxTransport(tls="tcp,self") as client:
            begun_s = time.monotonic()
            with pytest.raises(UnreachableError):
                client.connect(descriptor, writable=False, deadline_ns=after(1))
            assert time.monotonic() - begun_s < 20
    finally:
        owner.thaw()


def test_descriptors_of_other_kinds_and_versions(owner: OwnerProcess) -> None:
    import msgspec

    good = msgspec.msgpack.decode(owner.create(1, 4096))
    with UcxTransport(tls="tcp,self") as client:
        for at, value, why in ((0, "shm", "shm"), (1, 99, "version 99"), (3, [], "address"), (2, b"x", "owner")):
            other = list(good)
            other[at] = value
            with pytest.raises(DescriptorError, match=why):
                client.connect(msgspec.msgpack.encode(other), writable=False)
        other = list(good)
        other[3] = [("not an address", 80)]
        with pytest.raises(DescriptorError, match="impossible address"):
            client.connect(msgspec.msgpack.encode(other), writable=False)


def test_the_owner_checks_bounds_too(owner: OwnerProcess) -> None:
    """A client that was told another size: the owner refuses what lies outside, operation by operation."""
    import msgspec

    from transport.base import DENIED, DONE

    told = list(msgspec.msgpack.decode(owner.create(1, 64 * KIB, seed=5)))
    before = owner.digest_of(1)
    told[7] = 1 << 30  # size_bytes
    with UcxTransport(tls="tcp,self") as client:
        handle = client.connect(msgspec.msgpack.encode(told), writable=True)
        buffer = np.zeros(8 * KIB, np.uint8)
        rows = [(0, 0, 100), (100, 64 * KIB - 50, 100), (200, 1 << 20, 100)]
        for call in (client.read, client.write):
            batch = operations(buffer, handle, rows)
            buffer[:] = pattern(5, 64 * KIB)[: 8 * KIB]
            assert call(batch, after(20)) == 1
            assert batch.status.tolist() == [DONE, DENIED, DENIED]
            assert batch.error is not None
    assert owner.digest_of(1) == before


def test_device_memory_is_claimed_only_where_it_can_be_moved(owner: OwnerProcess) -> None:
    """A UCX with CUDA moves device memory by remote memory access, never as messages: then callers have to stage."""
    from types import SimpleNamespace

    with UcxTransport(tls="tcp,self") as client:
        real = client._context
        assert client.capabilities.data_path  # remembered: it looks at the real one
        client._context = SimpleNamespace(information=lambda: "tcp cuda_copy", version=real.version)
        assert client.capabilities.kinds == {"cpu"}, "not connected yet, so not known"
        handle = client.connect(owner.create(1, 4096), writable=True)
        assert client.read(operations(np.zeros(100, np.uint8), handle, [(0, 0, 100)]), after(20)) == 1
        assert client.capabilities.ordered and client.capabilities.kinds == {"cpu"}
        client._client = SimpleNamespace(remote_access=lambda: True, in_order=lambda: False, close=client._client.close)
        assert client.capabilities.kinds == {"cpu", "cuda"}
        client._context = real
        assert client.capabilities.kinds == {"cpu"}
