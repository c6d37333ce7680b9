"""GPU memory: the digest, gather and scatter on the device, and batches from and to its memory.

Importing this needs no GPU, no driver and no CuPy; opening a CUDA device does (`open_device`).
"""

from transport.gpu.cuda import open_device
from transport.gpu.device import Device, DeviceError, DeviceMemory, PinnedMemory, Stream
from transport.gpu.host import HostDevice
from transport.gpu.regions import DeviceRegion, lend
from transport.gpu.staging import Stager

__all__ = [
    "Device",
    "DeviceError",
    "DeviceMemory",
    "DeviceRegion",
    "HostDevice",
    "PinnedMemory",
    "Stager",
    "Stream",
    "lend",
    "open_device",
]
