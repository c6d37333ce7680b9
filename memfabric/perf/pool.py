"""A real pool to measure: `memfabric up` in processes of its own, which end with this one, even when it is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import memfabric
from memfabric import NamespaceSpec
from memfabric.client import AdminClient
from memfabric.errors import UnavailableError
from memfabric.perf import machine

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
NODES = 2
REGIONS_PER_NODE = 6
_LAUNCH = "import os, sys; from memfabric.processes import die_with_parent; die_with_parent(int(sys.argv[1])); "
_LAUNCH += "os.execv(sys.executable, [sys.executable, '-m', 'memfabric', *sys.argv[2:]])"


class BenchPool:
    """A metadata server and memory nodes on a free port of the loopback; ends with the context.

    Attributes:
        address: of the server.
        region_bytes: size of a region.
        pids: process ids by name: ``meta``, ``node-0``, ``node-1``, …
    """

    def __init__(self, memory_bytes: int, directory: Path, nodes: int = NODES, transport: str = "shm") -> None:
        """Start it.

        Args:
            memory_bytes: of all nodes together, about.
            directory: where regions are kept.
            nodes: how many.
            transport: by which they lend memory beside shared memory.

        Raises:
            UnavailableError: it did not start; with what it said.
        """
        self.directory = directory
        self.nodes = nodes
        self.region_bytes = max(1 << 20, memory_bytes // (nodes * REGIONS_PER_NODE) // 4096 * 4096)
        self._scratch = tempfile.TemporaryDirectory(prefix="memfabric-bench-")
        scratch = Path(self._scratch.name)
        ready, self._log = scratch / "ready.json", scratch / "log"
        command = [sys.executable, "-c", _LAUNCH, str(os.getpid()), "up"]
        command += ["--nodes", str(nodes), "--transport", transport]
        command += ["--memory", str(self.region_bytes * REGIONS_PER_NODE), "--region", str(self.region_bytes)]
        command += ["--directory", str(directory), "--address", "tcp://127.0.0.1:auto", "--ready-file", str(ready)]
        # The same memfabric as here, wherever that is, and not what lies in the working directory.
        here = str(Path(memfabric.__file__).parent.parent)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=scratch,
                env={**os.environ, "PYTHONPATH": here},
                start_new_session=True,
            )
        try:
            document = self._await(ready)
        except BaseException:
            self.close()
            raise
        self.address: str = document["address"]
        self.pids: dict[str, int] = document["pids"]

    def _await(self, ready: Path) -> dict[str, Any]:
        end_s = time.monotonic() + START_TIMEOUT_S
        while not ready.exists():
            if self._process.poll() is not None or time.monotonic() > end_s:
                raise UnavailableError(f"the pool did not start:\n{self.said()}")
            time.sleep(0.02)
        found: dict[str, Any] = json.loads(ready.read_text())
        return found

    @property
    def total_bytes(self) -> int:
        """All regions together."""
        return self.nodes * REGIONS_PER_NODE * self.region_bytes

    def said(self) -> str:
        """The end of what its processes wrote."""
        return self._log.read_text(errors="replace").strip()[-2000:]

    def check(self) -> None:
        """Nothing, while it runs.

        Raises:
            UnavailableError: it has ended.
        """
        if self._process.poll() is not None:
            raise UnavailableError(f"the pool ended unexpectedly:\n{self.said()}")

    def node_cpu_s(self) -> float:
        """Processor time that the memory nodes have used."""
        return sum(machine.cpu_s(pid) for name, pid in self.pids.items() if name != "meta")

    def create(self, name: str, block_bytes: int) -> None:
        """A namespace that may fill up: nothing is evicted ahead of need."""
        with AdminClient(self.address) as admin:
            admin.namespace_create(NamespaceSpec(name=name, block_bytes=block_bytes, high_ratio=1.0, low_ratio=1.0))

    def delete(self, name: str) -> None:
        """Drop a namespace, so that its regions are free for the next."""
        with AdminClient(self.address) as admin:
            admin.namespace_delete(name, force=True)

    def connect(self, namespace: str, *, verify: bool = True, threads: int = 0) -> memfabric.Client:
        """A client."""
        return memfabric.connect(
            self.address,
            namespace=namespace,
            verify=verify,
            copy_threads=threads,
            timeout_s=30.0,
            shm_directory=str(self.directory),
        )

    def close(self) -> None:
        """End all processes; they give the shared memory back."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._scratch.cleanup()

    def __enter__(self) -> BenchPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
