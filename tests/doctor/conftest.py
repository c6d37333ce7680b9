"""Made-up hosts: trees of files as a kernel shows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from memfabric.doctor import Finding, Severity
from memfabric.doctor.system import UNLIMITED, System


@dataclasses.dataclass(frozen=True)
class MadeSystem(System):
    """As `System`, and what would be asked of the kernel about this process is said beforehand."""

    allowed: bool = True
    reads: bool = True

    def may_use(self, path: Path) -> bool:
        return self.allowed

    def reads_own_memory(self) -> bool:
        return self.reads


class Host:
    """A made-up host below a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("proc", "sys", "dev", "boot", "shm"):
            (root / name).mkdir()

    def write(self, path: str, content: str | bytes = "") -> Host:
        """A file below the root; its folders are made."""
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content.encode() if isinstance(content, str) else content)
        return self

    def link(self, path: str, target: str) -> Host:
        """A symbolic link below the root."""
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)
        return self

    def system(self, *, memlock: int = UNLIMITED, files: int = 1 << 16, **more: object) -> MadeSystem:
        """The host as an examination sees it. Regions lie in `/shm` of the tree, which the tree calls /dev/shm."""
        roots = {name: self.root / name for name in ("proc", "sys", "dev", "boot")}
        limits = {"MEMLOCK": (memlock, memlock), "NOFILE": (files, files)}
        return MadeSystem(**roots, shared_memory=self.root / "shm", limits=limits, **more)  # type: ignore[arg-type]

    def adapter(self, name: str = "mlx5_0", number: int = 0, layer: str = "InfiniBand", **port: str) -> Host:
        """An RDMA adapter with one port and its file in /dev/infiniband."""
        files = {"state": "4: ACTIVE", "link_layer": layer, "rate": "200 Gb/sec (4X HDR)", **port}
        place = f"sys/devices/pci0000:00/0000:00:0{number + 1}.0/infiniband/{name}"
        for file, content in files.items():
            self.write(f"{place}/ports/1/{file}", content)
        self.link(f"{place}/device", f"{self.root}/sys/devices/pci0000:00/0000:00:0{number + 1}.0")
        self.link(f"sys/class/infiniband/{name}", f"{self.root}/{place}")
        self.write(f"sys/class/infiniband_verbs/uverbs{number}/ibdev", name)
        self.write(f"dev/infiniband/uverbs{number}")
        return self

    def gid(
        self, index: int, address: str, kind: str = "RoCE v2", interface: str = "eth0", name: str = "mlx5_0"
    ) -> Host:
        """An entry of port 1's table, after `adapter`."""
        place = f"sys/class/infiniband/{name}/ports/1"
        self.write(f"{place}/gids/{index}", address)
        self.write(f"{place}/gid_attrs/types/{index}", kind)
        return self.write(f"{place}/gid_attrs/ndevs/{index}", interface)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with nothing at all."""
    return Host(tmp_path)


def worst(findings: Iterable[Finding]) -> Severity:
    """The worst severity."""
    order = list(Severity)
    return min((finding.severity for finding in findings), key=order.index)


def one(findings: Iterable[Finding], words: str) -> Finding:
    """The only finding that says this."""
    (found,) = (finding for finding in findings if words in finding.what)
    return found


Check = Callable[[System], Iterable[Finding]]
