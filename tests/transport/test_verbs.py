"""verbs without a device: messages, the choice of device and GID, what is said where nothing fits, binary layout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport import _verbs, registry
from transport._verbs_devices import Device, Gid, Port, choose
from transport._verbs_messages import Descriptor, Hello, Queue, Welcome, decode, encode
from transport._verbs_owner import Link
from transport._verbs_peers import check_pieces
from transport.errors import DescriptorError, TransportError, UnsupportedError
from transport.verbs import VerbsTransport


def _has_headers() -> bool:
    compiler, text = shutil.which("cc"), "#include <infiniband/verbs.h>\n"
    if compiler is None:
        return False
    done = subprocess.run([compiler, "-E", "-"], input=text, capture_output=True, text=True, check=False)
    return done.returncode == 0


# --- messages ---

NONCE = bytes(16)
QUEUE = Queue(17, 4711, 0, bytes(16), 5, 16)
MESSAGES = [
    Descriptor("verbs", 1, NONCE, 1, 2, 4096, True, True),
    Hello(1, NONCE, True, QUEUE, [(1, 2)]),
    Hello(1, NONCE, False, None, []),
    Welcome(1, QUEUE, [[(0, 4096, 1 << 40, 77)]]),
    Welcome(1, None, [[]]),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_come_back_as_they_were(message: Descriptor | Hello | Welcome) -> None:
    assert decode(type(message), encode(message)) == message


@given(st.sampled_from([Descriptor, Hello, Welcome]), st.binary(max_size=400))
def test_random_bytes_are_no_message(kind: type[Descriptor | Hello | Welcome], raw: bytes) -> None:
    with pytest.raises(DescriptorError):
        decode(kind, raw)


@given(st.sampled_from(MESSAGES), st.data())
def test_damaged_messages_are_refused_or_messages(message: Descriptor | Hello | Welcome, data: st.DataObject) -> None:
    raw = bytearray(encode(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    for changed in (bytes(raw), bytes(raw[: data.draw(st.integers(0, len(raw)))])):
        try:
            decode(type(message), changed)
        except DescriptorError:
            pass


@pytest.mark.parametrize("message", MESSAGES[::2], ids=lambda message: type(message).__name__)
def test_another_version_is_said(message: Descriptor | Hello | Welcome) -> None:
    raw = encode(message)
    at = raw.index(b"\x01", 2 if isinstance(message, Descriptor) else 0)
    with pytest.raises(DescriptorError, match="version 2"):
        decode(type(message), raw[:at] + b"\x02" + raw[at + 1 :])


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, 4096, 1 << 40, 1), (4096, 4095, 1 << 40, 1)],
        [(0, 4096, 1 << 40, 1), (4097, 4095, 1 << 40, 1)],
        [(1, 8191, 1 << 40, 1)],
        [(0, 0, 1 << 40, 1), (0, 8192, 1 << 40, 1)],
        [(0, 8192, (1 << 64) - 4096, 1)],
        [(0, 8193, 1 << 40, 1)],
    ],
)
def test_pieces_that_do_not_make_the_region_are_refused(pieces: list[tuple[int, int, int, int]]) -> None:
    check_pieces([], 8192)
    check_pieces([(0, 4096, 1 << 40, 1), (4096, 4096, 1 << 50, 2)], 8192)
    with pytest.raises(DescriptorError):
        check_pieces(pieces, 8192)


# --- the choice ---


def gid(index: int, address: str, kind: str = "RoCE v2") -> Gid:
    import ipaddress

    found = ipaddress.ip_address(address)
    raw = bytes(10) + b"\xff\xff" + found.packed if found.version == 4 else found.packed
    return Gid(index, raw, kind)


def port(number: int = 1, state: str = "active", link: str = "Ethernet", gids: tuple[Gid, ...] = ()) -> Port:
    return Port(number, state, link, 4096, 3, 1 << 30, gids)


def device(name: str, *ports: Port, error: str = "") -> Device:
    return Device(name, "1.0", error, {}, ports)


LINK_LOCAL, V1, V4, V6 = (
    gid(0, "fe80::1"),
    gid(2, "10.0.0.1", "RoCE v1"),
    gid(3, "10.0.0.1"),
    gid(4, "2001:db8::1"),
)


@pytest.mark.parametrize(
    ("gids", "best"),
    [((LINK_LOCAL, V1, V6, V4), V4), ((LINK_LOCAL, V1, V6), V6), ((V1, LINK_LOCAL), LINK_LOCAL), ((V1,), V1)],
)
def test_the_gid_that_most_networks_route_is_chosen(gids: tuple[Gid, ...], best: Gid) -> None:
    chosen = choose([device("a", port(gids=gids))], None, None, None)
    assert chosen.gid == best
    assert str(best.address) in str(chosen)


def test_the_first_active_port_is_chosen_and_a_name_wins() -> None:
    found = [
        device("broken", error="can't be opened: Permission denied"),
        device("down", port(state="down", gids=(V4,))),
        device("two", port(1, "down", gids=(V4,)), port(2, gids=(V4,))),
        device("ib", port(link="InfiniBand")),
    ]
    assert str(choose(found, None, None, None)).startswith("two:2, Ethernet")
    assert str(choose(found, "ib", None, None)) == "ib:1, InfiniBand, LID 3"
    assert choose(found, "two", 2, 3).gid == V4


def test_where_nothing_fits_every_reason_is_told() -> None:
    found = [
        device("broken", error="can't be opened: Permission denied"),
        device("down", port(state="down", gids=(V4,))),
        device("bare", port()),
    ]
    with pytest.raises(UnsupportedError) as error:
        choose(found, None, None, None)
    for part in ("broken: can't be opened", "down:1 is down", "bare:1 has no GID (it has: none)"):
        assert part in str(error.value)
    with pytest.raises(UnsupportedError, match=r"no RDMA device fits mlx5_7; there are: broken .*, down"):
        choose(found, "mlx5_7", None, None)
    with pytest.raises(UnsupportedError, match=r"has no GID 9 \(it has: GID 3 10\.0\.0\.1 \(RoCE v2\)\)"):
        choose([device("a", port(gids=(V4,)))], None, None, 9)
    with pytest.raises(UnsupportedError, match="no RDMA device on this host"):
        choose([], None, None, None)


# --- without a device, a library, or sense ---


def test_a_missing_library_is_said_with_what_to_install() -> None:
    why = registry.why_not("verbs", library="/nowhere/libibverbs.so.1")
    assert "/nowhere/libibverbs.so.1" in why
    assert "apt install" in why


def test_another_library_is_no_libibverbs() -> None:
    why = registry.why_not("verbs", library="libm.so.6")
    assert "can't be opened" in why


def test_importing_the_module_opens_nothing() -> None:
    code = "import transport.verbs, sys; print(any('libibverbs' in line for line in open('/proc/self/maps')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("order", ["_ucx, _verbs", "_verbs, _ucx, _native"])
def test_the_native_modules_live_in_one_process(order: str) -> None:
    """Types of the same name are not taken for one another; that was a crash."""
    code = f"from transport import {order}; from memfabric import _native; _ucx.Client, _ucx.Owner, _verbs.Batch"
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "bad",
    [
        {"depth": 1},
        {"staging_bytes": 1},
        {"chunk_bytes": 5000},
        {"limit_ns": 0},
        {"timeout": 0},
        {"retries": 7},
        {"service_level": 16},
        {"traffic_class": 256},
        {"hop_limit": 0},
    ],
)
def test_impossible_options_are_refused_by_name(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        VerbsTransport(**bad)  # type: ignore[arg-type]


def test_links_have_sensible_defaults() -> None:
    assert Link() == Link(timeout=14, retries=6)


# --- the binary layout ---


@pytest.mark.skipif(not _has_headers(), reason="needs cc and the headers of libibverbs (Debian: libibverbs-dev)")
def test_the_layout_is_that_of_the_header(tmp_path: Path) -> None:
    lines = []
    for name in _verbs.layout():
        if name.startswith("IBV_"):
            value = name
        elif "." in name:
            kind, _, member = name.partition(".")
            value = f"offsetof(struct {kind}, {member})"
        else:
            value = f"sizeof(struct {name})"
        lines.append(f'printf("%s %zu\\n", "{name}", (size_t)({value}));')
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <infiniband/verbs.h>\nint main(void) {\n"
        + "\n".join(lines)
        + "\nreturn 0; }\n"
    )
    subprocess.run(["cc", "-o", tmp_path / "layout", source], check=True)
    told = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    theirs = {name: int(value) for name, value in (line.split() for line in told.splitlines())}
    assert theirs == _verbs.layout()


def test_a_real_library_without_devices_says_so() -> None:
    try:
        VerbsTransport().close()
    except UnsupportedError as error:
        assert any(part in str(error) for part in ("no RDMA device", "can't be opened", "no RDMA port", "listed"))
    except TransportError as error:  # pragma: no cover
        pytest.fail(f"another kind of error: {error!r}")
