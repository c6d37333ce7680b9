"""UCX over RoCE: the conformance suite with remote memory access (rc) on a Soft-RoCE device, with Debian's UCX."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from transport import Transport
from transport.testing import ConformanceSuite, OwnerProcess

ADDRESS = os.environ.get("RXE_VM_ADDR", "127.0.0.1")
RC = {
    "library": "libucp.so.0",
    "tls": "rc_verbs,ud_verbs,self",
    "devices": f"{os.environ.get('RXE_VM_DEV', 'rxe0')}:1",
    # Without the check UD packets between two ends of one address are dropped; 7 retries mean for ever on this device.
    "settings": {"UD_ETH_DGID_CHECK": "n", "RC_VERBS_RETRY_COUNT": "3", "SOCKADDR_TLS_PRIORITY": "rdmacm,tcp"},
}


class TestUcxRc(ConformanceSuite):
    factory = "transport.ucx:UcxTransport"
    options: ClassVar[dict[str, Any]] = RC
    owner_options: ClassVar[dict[str, Any]] = {"addresses": [ADDRESS]}
    region_bytes = 2 << 20
    slow = 6.0

    def test_remote_memory_access_is_used(self, owner: OwnerProcess, client: Transport) -> None:
        self.join(client, owner, owner.create(1, 4096))
        assert client.capabilities.one_sided
        assert not client.capabilities.ordered, "what has remote memory access does not travel as messages"
