"""RDMA adapters of made-up hosts."""

from __future__ import annotations

import pytest

from memfabric.doctor import Severity
from memfabric.doctor.rdma import in_software, rdma
from tests.doctor.conftest import Host, one, worst

V4 = "0000:0000:0000:0000:0000:ffff:c000:0201"
ZERO = "0000:0000:0000:0000:0000:0000:0000:0000"


def test_a_host_without_an_adapter(host: Host) -> None:
    (finding,) = rdma(host.system())
    assert (finding.severity, finding.what, finding.fix) == (Severity.INFO, "no RDMA adapter", ())


@pytest.mark.parametrize(
    ("vendor", "kind", "driver", "fix"),
    [
        ("0x15b3", "0x020000", "mlx5_core", "modprobe mlx5_ib"),
        ("0x15b3", "0x020700", "mlx4_core", "modprobe mlx4_ib"),
        ("0x8086", "0x020700", "", "lspci"),
    ],
)
def test_an_adapter_whose_rdma_driver_is_missing(host: Host, vendor: str, kind: str, driver: str, fix: str) -> None:
    place = "sys/bus/pci/devices/0000:3b:00.0"
    host.write(f"{place}/vendor", vendor).write(f"{place}/class", kind)
    if driver:
        host.link(f"{place}/driver", f"../../drivers/{driver}")
    (finding,) = rdma(host.system())
    assert finding.severity is Severity.WARNING
    assert "0000:3b:00.0" in finding.what
    assert finding.fix[0].startswith(fix)


def test_an_ordinary_network_card_is_no_rdma_adapter(host: Host) -> None:
    place = "sys/bus/pci/devices/0000:00:03.0"
    host.write(f"{place}/vendor", "0x8086").write(f"{place}/class", "0x020000")
    assert worst(rdma(host.system())) is Severity.INFO


def test_an_adapter_in_order(host: Host) -> None:
    host.adapter().gid(0, "fe80:0000:0000:0000:0002:c903:0029:7de1", "IB/RoCE v1")
    for module in ("ib_core", "mlx5_ib"):
        host.write(f"sys/module/{module}/refcnt", "1")
    findings = list(rdma(host.system()))
    assert worst(findings) is Severity.OK
    told = one(findings, "port 1").what
    assert told == ("mlx5_0 port 1: InfiniBand, ACTIVE, 200 Gb/sec (4X HDR); GID 0 fe80::2:c903:29:7de1 (IB/RoCE v1)")
    assert one(findings, "kernel modules").what.endswith("ib_core, mlx5_ib")
    assert one(findings, "uverbs0").severity is Severity.OK


def test_gids_that_are_not_set_are_left_out_and_numbers_are_in_order(host: Host) -> None:
    host.adapter(layer="Ethernet").gid(10, V4).gid(2, "fe80:0000:0000:0000:5054:00ff:fe12:3456").gid(3, ZERO)
    told = one(rdma(host.system()), "port 1").what
    assert told.endswith("GID 2 fe80::5054:ff:fe12:3456 (RoCE v2), 10 192.0.2.1 (RoCE v2)")


def test_many_gids_are_not_all_shown(host: Host) -> None:
    host.adapter(layer="Ethernet")
    for index in range(40):
        host.gid(index, V4)
    assert one(rdma(host.system()), "port 1").what.endswith("3 192.0.2.1 (RoCE v2) and 36 more")


@pytest.mark.parametrize("state", ["1: DOWN", "2: INIT", "3: ARMED"])
def test_a_port_that_is_not_active(host: Host, state: str) -> None:
    host.adapter(state=state).gid(0, V4)
    finding = one(rdma(host.system()), "port 1")
    assert finding.severity is Severity.PROBLEM
    assert state.split()[1] in finding.what
    assert finding.fix[0].startswith("rdma link show mlx5_0/1")


def test_an_unused_port_beside_one_in_use_is_usual(host: Host) -> None:
    host.adapter("mlx5_0", 0, state="1: DOWN").adapter("mlx5_1", 1)
    findings = list(rdma(host.system()))
    assert worst(findings) is Severity.INFO
    unused = one(findings, "mlx5_0 port 1")
    assert (unused.severity, unused.fix) == (Severity.INFO, ())
    assert one(findings, "mlx5_1 port 1").severity is Severity.OK


def test_no_port_in_use_is_a_problem(host: Host) -> None:
    host.adapter("mlx5_0", 0, state="1: DOWN").adapter("mlx5_1", 1, state="2: INIT")
    assert [finding.severity for finding in rdma(host.system()) if "port 1" in finding.what] == [Severity.PROBLEM] * 2


def test_roce_without_an_address(host: Host) -> None:
    host.adapter(layer="Ethernet").gid(0, ZERO)
    finding = one(rdma(host.system()), "port 1")
    assert finding.severity is Severity.PROBLEM
    assert "GID none" in finding.what
    assert finding.fix[1].startswith("ip address add")


def test_infiniband_without_a_gid_has_its_lid(host: Host) -> None:
    host.adapter()
    assert worst(rdma(host.system())) is Severity.OK


@pytest.mark.parametrize(("mtu", "worth"), [("1500", True), ("4200", False), ("9000", False), ("much", False)])
def test_roce_on_small_packets(host: Host, mtu: str, worth: bool) -> None:
    host.adapter(layer="Ethernet").gid(0, V4, interface="ens1").gid(1, V4, interface="ens1")
    host.write("sys/class/net/ens1/mtu", mtu)
    found = [finding for finding in rdma(host.system()) if "MTU" in finding.what]
    assert [(each.severity, each.fix[0].split(" #")[0]) for each in found] == (
        [(Severity.WARNING, "ip link set ens1 mtu 9000")] if worth else []
    )


def test_a_device_without_its_file(host: Host) -> None:
    host.adapter()
    (host.root / "dev/infiniband/uverbs0").unlink()
    finding = one(rdma(host.system()), "but not /dev/infiniband/uverbs0")
    assert finding.severity is Severity.PROBLEM
    assert "docker run --device /dev/infiniband/uverbs0" in finding.fix[0]


def test_a_device_without_uverbs(host: Host) -> None:
    host.adapter()
    (host.root / "sys/class/infiniband_verbs/uverbs0/ibdev").unlink()
    assert one(rdma(host.system()), "ib_uverbs is not loaded").fix == ("modprobe ib_uverbs",)


def test_a_file_that_may_not_be_opened(host: Host) -> None:
    host.adapter()
    finding = one(rdma(host.system(allowed=False)), "may not be opened")
    assert finding.severity is Severity.PROBLEM
    assert finding.fix[0].startswith("chmod a+rw /dev/infiniband/uverbs0")


def test_each_device_is_held_against_its_own_file(host: Host) -> None:
    """A container that was given one of two adapters sees both in /sys."""
    host.adapter("mlx5_0", 0).adapter("mlx5_1", 1)
    (host.root / "dev/infiniband/uverbs1").unlink()
    findings = list(rdma(host.system()))
    assert one(findings, "mlx5_1 is there, but not").severity is Severity.INFO
    assert one(findings, "uverbs0 may be opened").severity is Severity.OK


def test_a_device_in_software_is_told_from_hardware(host: Host) -> None:
    host.adapter()
    host.write("sys/devices/virtual/infiniband/rxe0/ports/1/state", "4: ACTIVE")
    host.link("sys/class/infiniband/rxe0", "../../devices/virtual/infiniband/rxe0")
    system = host.system()
    assert (in_software(system, "mlx5_0"), in_software(system, "rxe0")) == (False, True)
    assert one(rdma(system), "emulated").what == "rxe0 is emulated in software"


@pytest.mark.parametrize(
    ("files", "worth"),
    [
        ({"current_link_width": "16", "max_link_width": "16"}, False),
        ({"current_link_width": "8", "max_link_width": "16"}, True),
        ({"current_link_speed": "8.0 GT/s PCIe", "max_link_speed": "16.0 GT/s PCIe"}, True),
        ({"current_link_speed": "16.0 GT/s PCIe"}, False),
        ({"current_link_width": "0", "max_link_width": "255"}, False),
    ],
)
def test_a_slot_with_fewer_lanes(host: Host, files: dict[str, str], worth: bool) -> None:
    host.adapter()
    for name, content in files.items():
        host.write(f"sys/class/infiniband/mlx5_0/device/{name}", content)
    assert [finding.severity for finding in rdma(host.system()) if "slot" in finding.what] == (
        [Severity.WARNING] if worth else []
    )
