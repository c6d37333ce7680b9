"""The conformance suite that every transport passes, third parties' too.

A transport is held to what its `Capabilities` claim, with the region's owner in a process of its own, which the suite
kills, stops and restarts. In a test module of yours::

    from transport.testing import ConformanceSuite, OwnerProcess, make

    class TestMine(ConformanceSuite):
        factory = "mypackage.mytransport:MyTransport"
        options = {"device": "x0"}

A transport that lives in one process overrides `make_client` and `make_owner` (with an `OwnerInProcess`), and, where it
has a clock of its own, `now_ns` and `sleep`.

Needs pytest. What a transport does not claim is skipped, with that as the reason.
"""

from transport.testing.inprocess import OwnerInProcess
from transport.testing.owner import Owner, OwnerProcess, make
from transport.testing.suite import ConformanceSuite

__all__ = ["ConformanceSuite", "Owner", "OwnerInProcess", "OwnerProcess", "make"]
