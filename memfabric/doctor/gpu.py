"""GPUs, and whether an adapter can reach their memory without a detour (GPUDirect RDMA)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from memfabric.doctor import rdma
from memfabric.doctor.findings import Finding, Severity, shown
from memfabric.doctor.pci import devices
from memfabric.doctor.system import System

AREA = "GPU"
_DMABUF_KERNEL = (5, 12)
"""Source: ibv_reg_dmabuf_mr(3) needs the kernel's import of dma-buf into RDMA, which came with Linux 5.12."""
_NEEDED = ("CONFIG_DMA_SHARED_BUFFER", "CONFIG_INFINIBAND_USER_MEM")
_VERSION = re.compile(r"\b[0-9]{3,4}\.[0-9]{1,4}(?:\.[0-9]{1,4})?\b", re.ASCII)


def gpu(system: System) -> Iterator[Finding]:
    """Driver, GPUs, GPUDirect."""
    driver = system.text(system.proc / "driver/nvidia/version")
    if driver is None:
        if any(device.is_nvidia_gpu for device in devices(system)):
            yield Finding(
                AREA,
                Severity.WARNING,
                "there is an NVIDIA GPU, but its driver is not loaded",
                "blocks cannot be put from or read into its memory",
                ("nvidia-smi # says what is missing; in a container: docker run --gpus all ...",),
            )
        else:
            yield Finding(AREA, Severity.OK, "no NVIDIA GPU")
        return
    first = driver.partition("\n")[0]
    is_open = "Open Kernel Module" in first
    version = _VERSION.search(first)
    told = f"NVIDIA driver {version[0] if version else 'of unknown version'}"
    yield Finding(AREA, Severity.OK, f"{_models(system)}, {told}, {'open' if is_open else 'closed'} kernel modules")
    if rdma.names(system):
        yield _direct(system, is_open)
    else:
        yield Finding(AREA, Severity.INFO, "no RDMA adapter: blocks of GPUs go through host memory between hosts")


def _models(system: System) -> str:
    root = system.proc / "driver/nvidia/gpus"
    found = Counter(shown(system.field(root / name / "information", "Model"), 40) for name in system.names(root))
    return (
        ", ".join(f"{count} x {model or 'unknown model'}" for model, count in found.most_common(4)) or "no GPU listed"
    )


def _direct(system: System, is_open: bool) -> Finding:
    """Whether an adapter can register GPU memory: by nvidia_peermem or by dma-buf."""
    if (system.sys / "module/nvidia_peermem").exists():
        return Finding(AREA, Severity.OK, "GPUDirect by nvidia_peermem")
    against = []
    if not is_open:
        against.append("the driver's kernel modules are the closed ones")
    kernel = system.kernel()
    if kernel < _DMABUF_KERNEL:
        against.append(
            f"Linux {kernel[0]}.{kernel[1]} is older than 5.12" if any(kernel) else "Linux' version is unknown"
        )
    options = system.kernel_options()
    against += [f"the kernel was built without {name}" for name in _NEEDED if options and options.get(name, "n") == "n"]
    if not against:
        return Finding(AREA, Severity.OK, "GPUDirect by dma-buf, if the adapter's driver takes part")
    return Finding(
        AREA,
        Severity.WARNING,
        f"no GPUDirect: nvidia_peermem is not loaded, and dma-buf cannot be used ({'; '.join(against)})",
        "blocks of GPUs go through host memory before they are sent",
        ("modprobe nvidia_peermem", "# or install the open kernel modules of NVIDIA's driver, on Linux 5.12 or newer"),
    )
