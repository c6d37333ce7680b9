"""Load from several processes at once, and the verdict over what they did."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.processes.harness import Child, EndedError, Pool
from tests.processes.records import judge


class Load:
    """Writers and readers on the same chains."""

    def __init__(self, pool: Pool, *, seed: int, chains: int, chain_blocks: int, **arguments: Any) -> None:
        self.pool, self.seed = pool, seed
        self.arguments = {"chains": chains, "chain_blocks": chain_blocks, **arguments}
        self.workers: dict[str, Child] = {}
        self._started = 0

    def add(self, role: str, **arguments: Any) -> str:
        """Start one more worker; its name."""
        self._started += 1
        name = f"{role}-{self._started}"
        seed = self.seed * 1000 + self._started
        self.workers[name] = self.pool.start_worker(name, role, seed=seed, **{**self.arguments, **arguments})
        return name

    def start(self, writers: int, readers: int) -> Load:
        for role, count in (("writer", writers), ("reader", readers)):
            for _ in range(count):
                self.add(role)
        return self

    def kill(self, name: str) -> None:
        self.workers.pop(name).kill()

    def finish(self) -> Counter[str]:
        """Stop the workers and judge: no wrong bytes, no hang, no crash. Returns all counts together."""
        total: Counter[str] = Counter()
        for child in self.workers.values():
            if child.stopped:
                child.thaw()
            child.say(op="stop")
        for name, child in self.workers.items():
            try:
                report = child.wait_event("report", 150.0)
            except EndedError as error:
                raise AssertionError(f"{name} crashed or hung: {error}\n{child.log_tail()}") from None
            assert not report["wrong"], f"{name} got WRONG BYTES: {report['wrong']}"
            slowest = max(total["slowest_ms"], report["counts"].pop("slowest_ms", 0))
            total.update(report["counts"])
            for counter in ("corrupt_blocks", "stale_places", "verification_retries", "resends", "attaches"):
                total[f"stats.{counter}"] += report["stats"][counter]
            total["slowest_ms"] = slowest
            assert child.process.wait(30) == 0, f"{name} ended with {child.process.returncode}"
        self.workers.clear()
        total.update({f"records.{name}": count for name, count in judge(self.pool.records).items()})
        return total
