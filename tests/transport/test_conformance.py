"""Every transport that runs on a plain machine, through the conformance suite."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from transport._memory import tightest_room
from transport.testing import ConformanceSuite

_GIB = 1 << 30
_LARGE = 4 * _GIB + (64 << 20) if tightest_room("/dev/shm").free_bytes > 8 * _GIB else 0


class TestShm(ConformanceSuite):
    factory = "transport.shm:ShmTransport"
    large_bytes = _LARGE


def _ucx_missing() -> str:
    from transport.errors import UnsupportedError
    from transport.ucx import UcxTransport

    try:
        UcxTransport().close()
    except UnsupportedError as error:
        return str(error)
    return ""


@pytest.mark.skipif(bool(_ucx_missing()), reason=_ucx_missing())
class TestUcxTcp(ConformanceSuite):
    factory = "transport.ucx:UcxTransport"
    options: ClassVar[dict[str, Any]] = {"tls": "tcp,self"}
    owner_options: ClassVar[dict[str, Any]] = {"addresses": ["127.0.0.1"]}
    large_bytes = _LARGE


@pytest.mark.skipif(bool(_ucx_missing()), reason=_ucx_missing())
class TestUcxTcpLanes(ConformanceSuite):
    factory = "transport.ucx:UcxTransport"
    options: ClassVar[dict[str, Any]] = {"tls": "tcp,self"}
    owner_options: ClassVar[dict[str, Any]] = {"addresses": ["127.0.0.1"]}
    client_options: ClassVar[dict[str, Any]] = {"lanes": 3}
