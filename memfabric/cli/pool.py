"""The pool that ``memfabric up`` runs: what is started, what happens to it, how it ends.

Responsible for order and words: the metadata server first, then the nodes; at the end the nodes first. Which
processes run and how they are stopped is `memfabric.processes`' business.
"""

from __future__ import annotations

import enum
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import click

from memfabric import units
from memfabric.cli.base import DEFAULT_ADDRESS
from memfabric.cli.memory import SHARED_MEMORY
from memfabric.cli.output import note, plural
from memfabric.errors import UnavailableError
from memfabric.processes import Child, Event, Exited, Logged, Reported, Signalled, Supervisor

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

STOP_TIMEOUT_S = 10.0
META = "meta"


class Phase(enum.Enum):
    """Where in its life a pool is; it says what a child's end means."""

    STARTING = enum.auto()
    SERVING = enum.auto()
    STOPPING = enum.auto()


@dataclass(frozen=True)
class PoolPlan:
    """What to run.

    Attributes:
        address: where to serve; port 0 for a free one.
        node_count, memory_bytes, region_bytes: nodes, memory of each, size of a region.
        directory: shared memory to take it from.
        state_dir: where namespaces are kept; None for nowhere.
        log_level: of the processes.
        timeout_s: how long the metadata server may take to answer.
        transport: as for ``memfabric node``. insecure: allow addresses that other hosts can reach.
    """

    address: str
    node_count: int
    memory_bytes: int
    region_bytes: int
    directory: Path
    state_dir: Path | None = None
    log_level: str = "warning"
    timeout_s: float = 5.0
    transport: str = "auto"
    insecure: bool = False


@dataclass
class _Start:
    """A child on its way up."""

    done_bytes: int = 0
    ready: bool = False
    task: TaskID | None = None


class Pool:
    """A metadata server and nodes; a context manager that leaves no process behind.

    Attributes:
        address: of the metadata server, once it is ready.
        failures: one line for each thing that went wrong.
    """

    def __init__(self, plan: PoolPlan) -> None:
        self.plan = plan
        self.address = ""
        self.failures: list[str] = []
        self._supervisor = Supervisor()
        self._phase = Phase.STARTING
        self._stop_asked = False
        self._starts: dict[Child, _Start] = {}
        self._progress: Progress | None = None

    def __enter__(self) -> Pool:
        self._supervisor.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            self._supervisor.__exit__(kind, error, trace)

    # --- life ---

    def start(self) -> bool:
        """Bring everything up; False when the user asked to stop meanwhile.

        Raises:
            UnavailableError: a process ended instead of starting; with what it said.
        """
        with self._showing_progress():
            meta = self._start_child(META, self._meta_arguments())
            if not self._wait_ready([meta]):
                return False
            nodes = [
                self._start_child(f"node-{index}", self._node_arguments(index)) for index in range(self.plan.node_count)
            ]
            if not self._wait_ready(nodes):
                return False
            self._check_registered()
        self._phase = Phase.SERVING
        return True

    def watch(self) -> None:
        """Serve until asked to stop or until the metadata server ends."""
        meta = self._supervisor.children[0]
        while not self._stop_asked and meta.status is None:
            for event in self._supervisor.wait():
                self._handle(event)

    def stop(self) -> None:
        """End the nodes, then the metadata server; what does not end in time is killed."""
        self._phase = Phase.STOPPING
        killed: list[Child] = []
        nodes = [child for child in self._supervisor.children if child.name != META]
        if self._supervisor.running():
            note("Stopping …")
        for group in (nodes, [child for child in self._supervisor.children if child.name == META]):
            killed += self._supervisor.stop(group, STOP_TIMEOUT_S, self._handle)
        if killed:
            names = ", ".join(child.name for child in killed)
            self._fail(f"{names} did not end when asked and had to be killed")
        if any(child.status != 0 for child in nodes):
            self._sweep()

    def pids(self) -> dict[str, int]:
        """Process ids by name: ``meta``, ``node-0``, …"""
        return {child.name: child.pid for child in self._supervisor.running()}

    def summary(self) -> list[str]:
        """What runs and what to do next, line by line."""
        plan = self.plan
        total = units.format_bytes(plan.node_count * plan.memory_bytes)
        option = "" if self.address == DEFAULT_ADDRESS else f" --address {self.address}"
        directory = "" if plan.directory == SHARED_MEMORY else f" --directory {plan.directory}"
        connect = "" if self.address == DEFAULT_ADDRESS else f'"{self.address}", '
        return [
            "",
            click.style("The pool is ready.", bold=True, fg="green"),
            f"  metadata server   {self.address}",
            f"  memory            {total}: {plural(plan.node_count, 'node')} of "
            f"{units.format_bytes(plan.memory_bytes)} in regions of {units.format_bytes(plan.region_bytes)}",
            "",
            "Try next, in another terminal:",
            f"  memfabric status{option} --watch",
            f"  memfabric namespace create demo --block-size 64KiB{option}",
            f"  memfabric put -n demo --pad /etc/os-release{option}{directory}",
            f"  python -c 'import memfabric; print(memfabric.connect({connect}namespace=\"demo\").stats())'",
            "",
            "Ctrl-C stops everything.",
        ]

    # --- starting ---

    def _meta_arguments(self) -> list[str]:
        plan = self.plan
        arguments = ["meta", "--address", plan.address, "--log-level", plan.log_level]
        if plan.state_dir is not None:
            arguments += ["--state-dir", str(plan.state_dir)]
        return [*arguments, *self._insecure()]

    def _insecure(self) -> list[str]:
        return ["--insecure"] if self.plan.insecure else []

    def _node_arguments(self, index: int) -> list[str]:
        plan = self.plan
        arguments = ["node", "--name", f"node-{index}", "--address", self.address]
        arguments += ["--memory", str(plan.memory_bytes), "--region", str(plan.region_bytes)]
        arguments += ["--directory", str(plan.directory), "--log-level", plan.log_level]
        return [*arguments, "--transport", plan.transport, *self._insecure()]

    def _start_child(self, name: str, arguments: list[str]) -> Child:
        child = self._supervisor.start(name, arguments)
        start = self._starts[child] = _Start()
        if self._progress is not None and name != META:
            start.task = self._progress.add_task(name, total=self.plan.memory_bytes)
        return child

    def _wait_ready(self, children: list[Child]) -> bool:
        """Until all are ready; a child that ends ends the start."""
        while not all(self._starts[child].ready for child in children):
            for event in self._supervisor.wait():
                self._handle(event)
            for child in self._supervisor.children:
                if child.status is not None:
                    raise UnavailableError(f"{child.name} did not start ({child.describe_end()}){_story(child)}")
            if self._stop_asked:
                return False
        return True

    def _check_registered(self) -> None:
        """The server itself must know all nodes before anybody is told that the pool is ready."""
        from memfabric.client import AdminClient

        with AdminClient(self.address, timeout_s=self.plan.timeout_s) as admin:
            known = {node["name"] for node in admin.nodes()}
        missing = {child.name for child in self._starts if child.name != META} - known
        if missing:
            raise UnavailableError(f"{', '.join(sorted(missing))} started but did not join {self.address}")

    def _showing_progress(self) -> Progress:
        from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

        from memfabric.cli.output import console

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("claiming memory of {task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(binary_units=True),
            console=console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        return self._progress

    # --- what happens ---

    def _handle(self, event: Event) -> None:
        match event:
            case Signalled():
                self._stop_asked = True
            case Logged(child, line):
                self._log(child, line)
            case Reported(child, report):
                self._note_report(child, report)
            case Exited(child, _):
                self._note_exit(child)

    def _log(self, child: Child, line: str) -> None:
        if self._phase is Phase.STARTING and line.startswith("Error: "):
            return  # it becomes part of this command's own error
        note(f"{click.style(f'{child.name} |', fg='cyan')} {line}")

    def _note_report(self, child: Child, report: dict[str, object]) -> None:
        start = self._starts[child]
        done = report.get("done_bytes")
        if isinstance(done, int) and self._progress is not None and start.task is not None:
            self._progress.update(start.task, completed=done)
        address = report.get("address")
        if child.name == META and isinstance(address, str):
            self.address = address
        start.ready = start.ready or report.get("ready") is True

    def _note_exit(self, child: Child) -> None:
        if self._phase is Phase.STARTING:
            return  # `_wait_ready` tells
        if self._phase is Phase.STOPPING:
            # a child that was still being loaded had nothing to clean up and no handler for the signal
            unborn = child.status == -signal.SIGTERM and not self._starts[child].ready
            if child.status not in (0, -signal.SIGKILL) and not unborn:  # `stop` tells of those it killed
                self._fail(f"{child.name} did not end well ({child.describe_end()})")
            return
        if child.name == META:
            self._fail(f"the metadata server died ({child.describe_end()}), so the pool stops")
            return
        left = sum(other.name != META for other in self._supervisor.running())
        rest = f"its blocks are gone, {plural(left, 'node') if left else 'no node'} left"
        if child.status == 0:
            note(f"{child.name} was stopped; {rest}.")
            return
        self._fail(f"{child.name} died ({child.describe_end()}); {rest}")
        self._sweep()

    def _fail(self, message: str) -> None:
        self.failures.append(message)
        note(click.style(f"Error: {message}", fg="red", bold=True))

    def _sweep(self) -> None:
        """Give back the shared memory of nodes that could not do it themselves."""
        from transport.shm import ShmTransport

        try:
            freed = ShmTransport(self.plan.directory).sweep()
            if freed:
                note(f"Freed {plural(len(freed), 'region')} of shared memory left by nodes that died.")
        except OSError as error:
            note(f"Could not look for shared memory that was left: {error}")


def _story(child: Child) -> str:
    """The last thing that a child said: its error, or its last lines."""
    for line in reversed(child.tail):
        if line.startswith("Error: "):
            return f": {line.removeprefix('Error: ')}"
    last = [line for line in child.tail if line.strip()][-5:]
    return "".join(f"\n  {line}" for line in last)
