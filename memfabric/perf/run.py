"""Measures a plan, point by point, and makes the document of what was found.

Whatever goes wrong at a point is kept with the point, and what was measured is kept whatever goes wrong; only wrong
bytes end a sweep at once, because figures of a transport that delivers them are worth nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from memfabric.perf import machine, messages, tools
from memfabric.perf.children import PointError, SettingError, ask
from memfabric.perf.limits import applies, measurable
from memfabric.perf.memory import WrongBytesError
from memfabric.perf.plan import IDLE_S, RAW, SPLIT_RATIO, Plan, Point, Setting, set_bytes, set_count
from memfabric.perf.results import SCHEMA, Measured, merged, rates
from memfabric.perf.sites import PoolSite, RegionSite, Site
from memfabric.perf.tools import Figure

ANSWER_S = 60.0
"""Beyond what a command should take; an operation's own deadline is half of it."""
_SLOWEST_BYTES_PER_S = 5e6
_LEAD_NS = 3_000_000
_SEED_STEP = 1_000_003


@dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Attributes:
        done, total: visits of points. what: is being done now.
    """

    done: int
    total: int
    what: str


def run_sweep(plan: Plan, tell: Callable[[Progress], None], *, with_tools: bool = True) -> dict[str, Any]:
    """Measure everything.

    Args:
        tell: called at every step.
        with_tools: also run `ucx_perftest` and perftest, where they are.

    Returns:
        The document (`results`); ``stopped`` says why it is not complete, if it is not: KeyboardInterrupt ends a sweep
        in its order.

    Raises:
        WrongBytesError: what was read is not what was written.
    """
    return _Run(plan, tell, with_tools).all()


class _Run:
    def __init__(self, plan: Plan, tell: Callable[[Progress], None], with_tools: bool) -> None:
        self._plan, self._sweep, self._tell, self._with_tools = plan, plan.sweep, tell, with_tools
        self._found = {
            point: Measured(point, plan.sweep.verified(point)) for points in plan.points.values() for point in points
        }
        self._figures: list[Figure] = []
        self._info: dict[str, dict[str, str]] = {}
        self._left_behind: list[str] = []
        self._random = random.Random(plan.sweep.seed)
        self._done, self._visits = 0, plan.count() * plan.sweep.repeats
        self._begin_s = time.monotonic()

    def all(self) -> dict[str, Any]:
        facts, stopped = machine.facts(), ""
        try:
            self._measure_tools()
            for setting, points in self._plan.points.items():
                self._measure_setting(setting, points)
                if self._late():
                    stopped = f"the {self._sweep.total_s:g} s for the whole sweep were over"
                    break
        except KeyboardInterrupt:
            stopped = "interrupted"
        for found in self._found.values():
            if stopped and not found.problem and len(found.repeats) < self._sweep.repeats:
                found.problem = stopped
        return {
            "schema": SCHEMA,
            "stopped": stopped or None,
            "seconds": round(time.monotonic() - self._begin_s, 1),
            "machine": facts,
            "sweep": self._sweep.document(),
            "point_s": round(self._plan.point_s, 4),
            "memory_bytes": self._plan.memory_bytes,
            "transports": self._info,
            "tools": [figure.document() for figure in self._figures],
            "points": [each.document() for each in self._found.values()],
            "skipped": [{"point": str(point), "reason": reason} for point, reason in self._plan.skipped],
            "left_behind": self._left_behind,
        }

    def _late(self) -> bool:
        return self._sweep.total_s is not None and time.monotonic() - self._begin_s >= self._sweep.total_s

    def _say(self, what: str) -> None:
        self._tell(Progress(self._done, self._visits, what))

    def _measure_tools(self) -> None:
        ops = [op for op in self._sweep.ops if op in RAW]
        for fabric in self._sweep.fabrics if ops and self._with_tools else ():
            sizes = self._sweep.block_bytes
            if fabric.name == "ucx":
                self._say(f"ucx_perftest beside {fabric.label}")
                self._figures += tools.ucx_perftest(fabric.label, ops, sizes, fabric.arguments())
            elif fabric.name == "verbs":
                self._say(f"perftest beside {fabric.label}")
                self._figures += tools.perftest(fabric.label, ops, sizes, fabric.arguments())

    def _measure_setting(self, setting: Setting, points: Sequence[Point]) -> None:
        end = self._done + len(points) * self._sweep.repeats
        self._say(f"starting {'an owner' if setting.raw else 'a pool'} for {setting.transport}")
        try:
            with (RegionSite if setting.raw else PoolSite)(self._plan, setting, points) as site:
                if site.info:
                    self._info[setting.transport] = site.info
                try:
                    self._visit_all(site, points)
                finally:
                    self._left_behind += site.left_behind
        except SettingError as error:
            for point in points:
                found = self._found[point]
                if not found.problem and len(found.repeats) < self._sweep.repeats:
                    found.problem = str(error)
        self._done = end

    def _visit_all(self, site: Site, points: Sequence[Point]) -> None:
        idle_cpu_s = self._idle(site)
        for repeat in range(self._sweep.repeats):
            for point in self._random.sample(points, len(points)):
                found = self._found[point]
                if self._late():
                    found.problem = found.problem or "the time for the whole sweep was over"
                elif not found.problem:
                    self._say(str(point))
                    self._try(site, found, repeat, idle_cpu_s)
                self._done += 1
        self._say("stopping")

    def _try(self, site: Site, found: Measured, repeat: int, idle_cpu_s: float | None) -> None:
        try:
            self._visit(site, found, repeat, idle_cpu_s)
        except PointError as error:
            if error.kind == WrongBytesError.__name__:
                raise WrongBytesError(f"{found.point}: {error}") from error
            found.problem = str(error)
            site.check()

    def _idle(self, site: Site) -> float | None:
        """Processor seconds per second that nodes take while nobody asks anything of them."""
        before, begin_s = site.node_cpu_s(), time.monotonic()
        if before is None:
            return None
        time.sleep(IDLE_S)
        after = site.node_cpu_s()
        return None if after is None else (after - before) / (time.monotonic() - begin_s)

    def _visit(self, site: Site, found: Measured, repeat: int, idle_cpu_s: float | None) -> None:
        point = found.point
        clients = site.clients[: point.clients]
        with site.place(point) as namespace:
            try:
                ready = ask(
                    clients, self._prepare(site, point, repeat, namespace), messages.Ready, self._patience(point)
                )
                found.ready = ready[0]
                offered = [name for name in ready[0].limits if all(name in each.limits for each in ready)]
                found.limit = applies(point, site.fabric, ready[0], offered)
                found.repeats.append(self._measure(site, found, measurable(point, offered), idle_cpu_s))
            except PointError:
                ask(clients, [messages.Finish()] * len(clients), messages.Done, ANSWER_S)
                raise
            ask(clients, [messages.Finish()] * len(clients), messages.Done, ANSWER_S)

    def _prepare(self, site: Site, point: Point, repeat: int, namespace: str) -> list[messages.Prepare]:
        sweep = self._sweep
        return [
            messages.Prepare(
                op=point.op,
                block_bytes=point.block_bytes,
                batch=point.batch,
                depth=point.depth,
                threads=point.threads,
                set_count=set_count(sweep, point),
                verify=sweep.verified(point),
                random_order=sweep.random_order,
                span=site.span(point, number),
                namespace=namespace,
                seed=sweep.seed + _SEED_STEP * (repeat * point.clients + number),
            )
            for number in range(point.clients)
        ]

    def _patience(self, point: Point) -> float:
        return ANSWER_S + set_bytes(self._sweep, point) * point.clients / _SLOWEST_BYTES_PER_S

    def _measure(self, site: Site, found: Measured, offered: Sequence[str], idle_cpu_s: float | None) -> dict[str, Any]:
        """The operation and its limits, in an order that chance decides; the record of a visit."""
        point = found.point
        clients = site.clients[: point.clients]
        record: dict[str, Any] = {}
        for what in self._random.sample(["op", *offered], 1 + len(offered)):
            window_s = self._plan.point_s / self._sweep.repeats * SPLIT_RATIO[what]
            before, begin_s = site.node_cpu_s() if what == "op" else None, time.monotonic()
            order = messages.Run(
                what=what, start_ns=time.monotonic_ns() + _LEAD_NS * point.clients, window_ns=int(window_s * 1e9)
            )
            answers = ask(clients, [order] * len(clients), messages.Ran, self._patience(point) + window_s)
            if what != "op":
                record[what] = rates(answers)
                continue
            after, wall_s = site.node_cpu_s(), time.monotonic() - begin_s
            record |= rates(answers)
            record["wall_s"] = round(wall_s, 6)
            record["busy_s"] = [round(each.busy_ns / 1e9, 6) for each in answers]
            found.histogram.merge(merged(answers))
            if before is not None and after is not None:
                record["node_cpu_s"] = round(after - before, 6)
                record["node_cpu_beyond_idle_s"] = round(after - before - (idle_cpu_s or 0.0) * wall_s, 6)
        record["ratio"] = self._ratio(found, record)
        return record

    def _ratio(self, found: Measured, record: dict[str, Any]) -> float | None:
        """How near to the limit that applies: 1 is as fast."""
        name = "bytes_per_s" if record["bytes"] else "blocks_per_s"
        limit = record[found.limit][name] if found.limit in record else tool_figure(self._figures, found)
        return round(record[name] / limit, 4) if limit else None


def tool_figure(figures: Sequence[Figure], found: Measured) -> float | None:
    """What a tool said for a point, if it is what the point is held against."""
    point = found.point
    for figure in figures:
        same = (figure.transport, figure.op, figure.block_bytes) == (point.transport, point.op, point.block_bytes)
        if figure.tool == found.limit and same:
            return figure.bytes_per_s
    return None
