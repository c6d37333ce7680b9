"""What a figure was taken on: figures without it mean nothing."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import transport

_PACKAGES = ("memfabric", "numpy", "pyzmq", "msgspec")
_ROOT = Path(__file__).resolve().parents[2]
"""Of the repository, if this is run from one."""


def facts() -> dict[str, Any]:
    """Processor, memory, kernel, versions, revision, date."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "hypervisor": " hypervisor" in _text("/proc/cpuinfo"),
        "shmem_huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "digest": transport.implementations()[0],
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "revision": _revision(),
    }


def shared_memory_free_bytes(directory: Path) -> int:
    """What the file system of regions has left."""
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def resident_bytes(pid: int | str = "self") -> int:
    """Resident memory of a process, without what it shares with others through files."""
    fields = _text(f"/proc/{pid}/statm").split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    """Processor time that the living threads of a process have used."""
    threads = [_text(f"{task}/schedstat") for task in Path(f"/proc/{pid}/task").iterdir()]
    if all(threads):
        return sum(int(thread.split()[0]) for thread in threads) / 1e9
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()  # in clock ticks: coarser, but always there
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpu_model() -> str:
    for line in _text("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = _text(f"{index}/type").strip()
        if kind != "Instruction":
            found[f"L{_text(f'{index}/level').strip()}"] = _text(f"{index}/size").strip()
    return found


def _chosen(path: str) -> str:
    """The alternative in brackets."""
    return _text(path).partition("[")[2].partition("]")[0]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "source tree"


def _revision() -> str:
    """Of the repository; with a plus sign where tracked files differ from it."""
    if not (_ROOT / ".git").exists():  # installed: what repository is around it says nothing
        return f"release {_version('memfabric')}"
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
