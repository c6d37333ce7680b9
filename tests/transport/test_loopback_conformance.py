"""The loopback transport through the conformance suite: as each real transport, in fair and in foul weather."""

from __future__ import annotations

import time
from typing import ClassVar

import pytest

from transport.base import Transport
from transport.loopback import Delay, Fabric, Fault, LoopbackTransport, Reorder, Tear
from transport.testing import ConformanceSuite, Owner, OwnerInProcess
from transport.testing.suite import SECOND_NS

_FOUL = [
    Delay(probability=0.3, least_ns=1000, most_ns=2_000_000),
    Reorder(probability=0.5, most_ns=1_000_000),
    Tear(probability=0.5, pieces=5, most_ns=500_000),
]


class LoopbackSuite(ConformanceSuite):
    profile: ClassVar[str]

    @pytest.fixture(params=["fair", "foul-1", "foul-2", "foul-3"], autouse=True)
    def fabric(self, request: pytest.FixtureRequest) -> Fabric:
        weather, _, seed = request.param.partition("-")
        faults: list[Fault] = [*_FOUL] if weather == "foul" else []
        self.world = Fabric(int(seed or 0), faults=faults)
        self.clients = 0
        return self.world

    def make_client(self) -> Transport:
        self.clients += 1
        return LoopbackTransport(self.world, f"client{self.clients}", self.profile)

    def make_owner(self) -> Owner:
        world = self.world

        def make() -> Transport:
            world.restart("owner")
            return LoopbackTransport(world, "owner", self.profile)

        return OwnerInProcess(
            make, lambda: world.stall("owner"), lambda: world.wake("owner"), lambda: world.kill("owner")
        )

    def now_ns(self) -> int:
        return self.world.now_ns()

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.02))  # for the suite's own threads
        self.world.run_for(int(seconds * SECOND_NS))


class TestAsShm(LoopbackSuite):
    profile = "shm"


class TestAsUcxPut(LoopbackSuite):
    profile = "ucx-put"


class TestAsUcxMessage(LoopbackSuite):
    profile = "ucx-message"


class TestAsVerbs(LoopbackSuite):
    profile = "verbs"
