"""GPUs and GPUDirect of made-up hosts. No GPU was at hand: the files are as people show those of NVIDIA's driver."""

from __future__ import annotations

import gzip

import pytest

from memfabric.doctor import Severity
from memfabric.doctor.gpu import gpu
from tests.doctor.conftest import Host, one, worst

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  555.42.02  Release Build\nGCC version: 12"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023"


def with_driver(host: Host, version: str, kernel: str = "6.8.0-41-generic") -> Host:
    host.write("proc/driver/nvidia/version", version).write("proc/sys/kernel/osrelease", kernel)
    for number in range(8):
        host.write(f"proc/driver/nvidia/gpus/0000:{number}b:00.0/information", "Model: \t\t NVIDIA H100\nIRQ: 4")
    return host


def test_no_gpu(host: Host) -> None:
    assert [finding.severity for finding in gpu(host.system())] == [Severity.OK]


def test_a_gpu_without_its_driver(host: Host) -> None:
    place = "sys/bus/pci/devices/0000:41:00.0"
    host.write(f"{place}/vendor", "0x10de").write(f"{place}/class", "0x030200")
    assert worst(gpu(host.system())) is Severity.WARNING


def test_an_nvidia_sound_device_is_no_gpu(host: Host) -> None:
    place = "sys/bus/pci/devices/0000:41:00.1"
    host.write(f"{place}/vendor", "0x10de").write(f"{place}/class", "0x040300")
    assert worst(gpu(host.system())) is Severity.OK


def test_models_and_driver_are_told(host: Host) -> None:
    findings = list(gpu(with_driver(host, OPEN).system()))
    assert findings[0].what == "8 x NVIDIA H100, NVIDIA driver 555.42.02, open kernel modules"
    assert one(findings, "no RDMA adapter").severity is Severity.INFO


@pytest.mark.parametrize(
    ("version", "kernel", "module", "severity", "words"),
    [
        (OPEN, "6.8.0-41-generic", False, Severity.OK, "GPUDirect by dma-buf"),
        (OPEN, "5.12.0", False, Severity.OK, "GPUDirect by dma-buf"),
        (OPEN, "5.4.0-100-generic", False, Severity.WARNING, "Linux 5.4 is older than 5.12"),
        (OPEN, "4.18.0-553.el8", True, Severity.OK, "GPUDirect by nvidia_peermem"),
        (OPEN, "who knows", False, Severity.WARNING, "version is unknown"),
        (CLOSED, "6.8.0-41-generic", False, Severity.WARNING, "kernel modules are the closed ones"),
        (CLOSED, "6.8.0-41-generic", True, Severity.OK, "GPUDirect by nvidia_peermem"),
    ],
)
def test_gpudirect(host: Host, version: str, kernel: str, module: bool, severity: Severity, words: str) -> None:
    with_driver(host, version, kernel).adapter()
    if module:
        host.write("sys/module/nvidia_peermem/refcnt", "0")
    assert one(gpu(host.system()), words).severity is severity


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("options", "severity"),
    [
        ("CONFIG_DMA_SHARED_BUFFER=y\nCONFIG_INFINIBAND_USER_MEM=y\n", Severity.OK),
        ("CONFIG_DMA_SHARED_BUFFER=y\n# CONFIG_INFINIBAND_USER_MEM is not set\n", Severity.WARNING),
        ("CONFIG_INFINIBAND_USER_MEM=y\n", Severity.WARNING),
    ],
)
def test_the_kernel_is_built_for_it(host: Host, packed: bool, options: str, severity: Severity) -> None:
    with_driver(host, OPEN).adapter()
    if packed:
        host.write("proc/config.gz", gzip.compress(options.encode()))
    else:
        host.write("boot/config-6.8.0-41-generic", options)
    assert worst(gpu(host.system())) is severity
