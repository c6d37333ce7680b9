"""The examination: every check, side by side, each for a limited time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from memfabric.doctor import fabrics, gpu, host, memory, pool, probe, rdma, software
from memfabric.doctor.findings import Finding, Report, Severity, shown
from memfabric.doctor.probe import Probed
from memfabric.doctor.system import System
from memfabric.doctor.tasks import Task
from transport import registry

CHECK_LIMIT_S = 30.0
"""Checks read some files, a thousand at most, in milliseconds; on an emulated, busy machine that took over 10 s."""

Check = Callable[[System], Iterable[Finding]]

CHECKS: dict[str, Check] = {
    "RDMA": rdma.rdma,
    "locked memory": memory.locked_memory,
    "GPU": gpu.gpu,
    "shared memory": memory.shared_memory,
    "memory": memory.limits,
    "huge pages": memory.huge_pages,
    "NUMA": host.memory_nodes,
    "frequency": host.frequency,
    "clock": host.clock,
    "network": host.network,
    "open files": host.open_files,
    "process memory": host.process_memory,
    "memfabric": software.software,
}
"""By the area that a failure of the check itself is reported under."""


def examine(
    system: System | None = None,
    *,
    address: str | None = None,
    timeout_s: float = 5.0,
    ask: Callable[[str], Probed] = probe.ask,
    checks: dict[str, Check] | None = None,
    limit_s: float = CHECK_LIMIT_S,
) -> Report:
    """Look at everything. It changes nothing, raises nothing, and takes about a second; a minute if all hangs.

    Args:
        system: where to look; None: this host.
        address: of a metadata server that shall answer; None: no pool is looked at.
        timeout_s: how long to wait for an answer of that server.
        ask: how a transport is tried.
        checks: other checks than `CHECKS`.
        limit_s: how long each may take.
    """
    system = system or System()
    trials = {name: Task(partial(ask, name)) for name in registry.names()}
    tasks = {area: Task(partial(_all, check, system)) for area, check in (CHECKS if checks is None else checks).items()}
    found: list[Finding] = []
    for area, task in tasks.items():
        found += _findings(area, task, limit_s)
    probed = []
    for name, trial in trials.items():
        told, trouble = trial.result(probe.LIMIT_S + 5)
        probed.append(told or Probed(name, trouble))
    verdicts = [fabrics.verdict(system, each) for each in probed]
    found += fabrics.findings(system, probed)
    if address is not None:
        look = Task(lambda: list(pool.pool(system, address, timeout_s, verdicts)))
        found += _findings("pool", look, limit_s + 7 * timeout_s)  # attaching, and some requests
    return Report(ordered(found), verdicts)


def _all(check: Check, system: System) -> list[Finding]:
    return list(check(system))


def _findings(area: str, task: Task[list[Finding]], limit_s: float) -> list[Finding]:
    """What a check found, or that it could not be made."""
    found, trouble = task.result(limit_s)
    if found is not None:
        return found
    return [Finding(area, Severity.WARNING, f"could not be examined: {shown(trouble, 200)}")]


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first, else as they come."""
    order = list(Severity)
    return sorted(findings, key=lambda finding: order.index(finding.severity))
