"""What can go wrong in a `transport.loopback.Fabric`, and what a simulated transport claims, as plain data.

Instants are nanoseconds on the fabric's clock, host names are those given to transports, `ANY` stands for all.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

ANY = "*"
FOREVER_NS = 1 << 62


@dataclass(frozen=True)
class Profile:
    """How a simulated transport behaves: which real one it stands for.

    Owners and clients that shall meet have equal profiles.
    """

    label: str
    """Stands in descriptors and in `Capabilities.data_path`."""
    one_sided: bool = True
    """Memory of a stalled owner can be read and written."""
    ordered: bool = True
    """Operations of batches with `threads=1` are performed in their order, each whole before the next."""
    inline_digest: bool = False
    fences: frozenset[str] = frozenset({"client", "region"})
    """Without `"client"` late writes can't be kept out; without `"region"` who is connected stays so."""
    detects: frozenset[str] = frozenset({"death"})
    """Of `"death"` and `"link"`; what is not detected ends at the deadline."""
    needs_exchange: bool = False
    outlives_client: bool = True
    """What a client sent before it died may land; False: its own processor copies, and stops with it."""
    detect_ns: int = 1_000_000
    """From a loss to its being noticed, at most."""
    limit_ns: int = 30_000_000_000
    """Deadline of batches that are given none."""

    def __post_init__(self) -> None:
        if not self.fences <= {"client", "region"}:
            raise ValueError(f"fences are 'client' and 'region', not {sorted(self.fences)}")
        if not self.detects <= {"death", "link"}:
            raise ValueError(f"'death' and 'link' can be detected, not {sorted(self.detects)}")
        if self.detect_ns < 1 or self.limit_ns < 1:
            raise ValueError("detect_ns and limit_ns must be at least 1")


PROFILES = {
    each.label: each
    for each in (
        Profile("shm", inline_digest=True, fences=frozenset(), detects=frozenset(), outlives_client=False),
        Profile("ucx-put", ordered=False),
        Profile("ucx-message", one_sided=False),
        Profile("verbs", needs_exchange=True, detects=frozenset({"death", "link"})),
    )
}
"""Those of the real transports, by label."""


@dataclass(frozen=True, kw_only=True)
class LinkFault:
    """Befalls operations between two hosts; whether one, and how much, is drawn from the fabric's seed."""

    client: str = ANY
    owner: str = ANY
    from_ns: int = 0
    until_ns: int = FOREVER_NS
    probability: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be 0 to 1, got {self.probability}")
        if not 0 <= self.from_ns <= self.until_ns:
            raise ValueError(f"a fault from {self.from_ns} until {self.until_ns} ns never is")

    def applies(self, client: str, owner: str, now_ns: int) -> bool:
        """Whether operations that are posted now may meet it."""
        return self.from_ns <= now_ns < self.until_ns and self.client in (ANY, client) and self.owner in (ANY, owner)


@dataclass(frozen=True, kw_only=True)
class Delay(LinkFault):
    """Takes longer, evenly from `least_ns` to `most_ns`, each way."""

    least_ns: int = 0
    most_ns: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.least_ns <= self.most_ns:
            raise ValueError(f"a delay of {self.least_ns} to {self.most_ns} ns can't be")


@dataclass(frozen=True, kw_only=True)
class Reorder(LinkFault):
    """Is held back by up to `most_ns`, so that later ones overtake it; not where order is promised."""

    most_ns: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most_ns < 0:
            raise ValueError(f"most_ns must be at least 0, got {self.most_ns}")


@dataclass(frozen=True, kw_only=True)
class Drop(LinkFault):
    """Never arrives; or is performed, and its answer never arrives.

    On an ordered connection nothing that was posted after a lost request is performed either.
    """

    what: Literal["request", "answer"] = "request"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.what not in ("request", "answer"):
            raise ValueError(f"what is 'request' or 'answer', not {self.what!r}")


@dataclass(frozen=True, kw_only=True)
class Tear(LinkFault):
    """Is performed in up to `pieces` pieces of whole 64-byte lines, in any order, over up to `most_ns`."""

    pieces: int = 4
    most_ns: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pieces < 2 or self.most_ns < 0:
            raise ValueError(f"pieces must be at least 2 and most_ns at least 0, got {self.pieces}, {self.most_ns}")


@dataclass(frozen=True, kw_only=True)
class HostFault:
    """Befalls one host at an instant."""

    host: str
    at_ns: int


@dataclass(frozen=True, kw_only=True)
class Stall(HostFault):
    """Stops, and goes on after `for_ns`: what it had posted waits with it, and lands then unless it was fenced."""

    for_ns: int = FOREVER_NS


@dataclass(frozen=True, kw_only=True)
class Death(HostFault):
    """Ends for good. Its memory is `"gone"`, or `"kept"` for those who are connected (files in shared memory)."""

    memory: Literal["gone", "kept"] = "gone"

    def __post_init__(self) -> None:
        if self.memory not in ("gone", "kept"):
            raise ValueError(f"memory is 'gone' or 'kept', not {self.memory!r}")


@dataclass(frozen=True, kw_only=True)
class Restart(HostFault):
    """Begins a new life, killed before if need be: transports can be made there again, none of the old ones works."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Two hosts can't reach each other from `at_ns` for `for_ns`; what crosses the cut is lost."""

    one: str
    other: str
    at_ns: int
    for_ns: int = FOREVER_NS


Fault: TypeAlias = LinkFault | HostFault | Partition


@dataclass(frozen=True, kw_only=True)
class Chance:
    """Mean time between faults of a kind on each host (or pair); 0: none. For `schedule`."""

    stall_ns: int = 0
    death_ns: int = 0
    partition_ns: int = 0
    lasts_ns: int = 1_000_000
    """Of stalls, partitions, and from a death to the restart: evenly up to this."""
    memory: tuple[Literal["gone", "kept"], ...] = field(default=("gone",))


def schedule(seed: int, hosts: list[str], until_ns: int, chance: Chance) -> list[Fault]:
    """Faults of hosts drawn from a seed, in the order of their instants."""
    rng = random.Random(seed)
    found: list[tuple[int, Fault]] = []

    def instants(mean_ns: int) -> list[int]:
        out, at_ns = [], 0.0
        while mean_ns:
            at_ns += rng.expovariate(1 / mean_ns)
            if at_ns >= until_ns:
                break
            out.append(int(at_ns))
        return out

    for number, host in enumerate(hosts):
        for at_ns in instants(chance.stall_ns):
            found.append((at_ns, Stall(host=host, at_ns=at_ns, for_ns=1 + int(rng.random() * chance.lasts_ns))))
        for at_ns in instants(chance.death_ns):
            memory = chance.memory[int(rng.random() * len(chance.memory))]
            back_ns = at_ns + 1 + int(rng.random() * chance.lasts_ns)
            found.append((at_ns, Death(host=host, at_ns=at_ns, memory=memory)))
            found.append((back_ns, Restart(host=host, at_ns=back_ns)))
        for other in hosts[number + 1 :]:
            for at_ns in instants(chance.partition_ns):
                for_ns = 1 + int(rng.random() * chance.lasts_ns)
                found.append((at_ns, Partition(one=host, other=other, at_ns=at_ns, for_ns=for_ns)))
    return [fault for _, fault in sorted(found, key=lambda pair: pair[0])]
