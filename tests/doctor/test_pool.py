"""Whether a pool can be used from here."""

from __future__ import annotations

from typing import Any

import pytest

from memfabric.doctor import Finding, Severity, TransportVerdict
from memfabric.doctor.pool import pool
from memfabric.doctor.software import installed_extras, software
from memfabric.errors import RefusedError, UnavailableError
from tests.doctor.conftest import Host, one, worst

ADDRESS = "tcp://10.0.0.1:7170"
HERE = "0b1c"


def look(host: Host, document: dict[str, Any], usable: str = "shm ucx", took_ns: int = 200_000) -> list[Finding]:
    host.write("proc/sys/kernel/random/boot_id", f"{HERE}\n")
    verdicts = [TransportVerdict(name, name in usable.split(), "") for name in ("shm", "ucx")]
    return list(pool(host.system(), ADDRESS, 1.0, verdicts, lambda address, timeout_s: (document, took_ns)))


def node(transports: list[str], host: str = "elsewhere", state: str = "active") -> dict[str, Any]:
    return {"name": "gpu7", "state": state, "host": host, "transports": transports}


def test_a_server_that_answers(host: Host) -> None:
    (finding,) = look(host, {"nodes": [node(["shm", "ucx"])]})
    assert finding.severity is Severity.OK
    assert finding.what.startswith(f"{ADDRESS} answers in 200")
    assert finding.what.endswith("protocol 1; 1 node")


def test_a_server_that_is_far_away(host: Host) -> None:
    assert worst(look(host, {}, took_ns=20_000_000)) is Severity.WARNING


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (UnavailableError(f"no metadata server answered at {ADDRESS} within 1 s"), "no metadata server answered"),
        (RefusedError("version", "peer speaks protocol version 9"), f"{ADDRESS}: peer speaks protocol version 9"),
    ],
)
def test_a_server_that_does_not(host: Host, error: Exception, what: str) -> None:
    def fails(address: str, timeout_s: float) -> tuple[dict[str, Any], int]:
        raise error

    (finding,) = pool(host.system(), ADDRESS, 1.0, [], fails)
    assert finding.severity is Severity.PROBLEM
    assert finding.what.startswith(what)


@pytest.mark.parametrize(
    ("lends", "where", "usable", "reached"),
    [
        (["shm"], HERE, "shm ucx", True),
        (["shm"], "elsewhere", "shm ucx", False),
        (["shm", "ucx"], "elsewhere", "shm ucx", True),
        (["shm", "ucx"], "elsewhere", "shm", False),
        (["ucx"], HERE, "ucx", True),
        (["shm"], HERE, "ucx", False),
        ([], "elsewhere", "shm", True),  # an older server, which does not tell
    ],
)
def test_whether_a_node_can_be_reached(host: Host, lends: list[str], where: str, usable: str, reached: bool) -> None:
    findings = look(host, {"nodes": [node(lends, where)]}, usable)
    assert (worst(findings) is Severity.OK) == reached
    if not reached:
        assert "memfabric node --name gpu7 --transport" in one(findings, "lends over").fix[0]


def test_a_dead_node(host: Host) -> None:
    assert one(look(host, {"nodes": [node(["shm"], state="dead")]}), "is dead").severity is Severity.WARNING


@pytest.mark.parametrize("document", [{"nodes": None}, {"nodes": [None, 3]}, {"nodes": [{"transports": [None, 7]}]}])
def test_a_document_that_makes_no_sense(host: Host, document: dict[str, Any]) -> None:
    assert worst(look(host, document)) is Severity.OK


def test_extras_are_complete_or_not() -> None:
    found = installed_extras(
        [
            "click>=8",
            'numpy>=1; extra == "some"',
            "pytest; python_version > '3' and extra == 'some'",
            'numpy; extra == "part"',
            'there-is-no-such-package-of-that-name>=1; extra == "part"',
            'memfabric[some]; extra == "all"',
            '; extra == "odd"',
            "",
        ]
    )
    assert found == {"some": True, "part": False, "all": True}


def test_the_version_is_told(host: Host) -> None:
    from memfabric.core.messages import PROTOCOL_VERSION

    assert f"protocol {PROTOCOL_VERSION}, Python 3." in next(iter(software(host.system()))).what
