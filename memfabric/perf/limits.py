"""Which limits are measured beside a point, and which of them is its own.

* ``memcpy``: as many blocks, each copied by one native memcpy: the limit of what is copied on one host.
* ``socket``: as many bytes through one plain TCP connection over the loopback, which is the limit of what travels over
  TCP between two processes here; for requests as many round trips with as many bytes of keys.
* ``ucx_perftest``, ``ib_read_bw``, ``ib_write_bw``: what these tools say of RDMA, where they are installed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from memfabric.perf import messages
from memfabric.perf.axes import Fabric
from memfabric.perf.plan import RAW, REQUESTS, Point

_TCP_ONLY = re.compile(r"(tcp|self)(,(tcp|self))*")
_RDMA = re.compile(r"\b(rdma|rc|rc_verbs|rc_mlx5|dc|dc_mlx5|ud_verbs|ib)\b", re.IGNORECASE)


def measurable(point: Point, offered: Sequence[str]) -> list[str]:
    """What is run beside a point, of what its clients offer."""
    return ["socket"] if point.op in REQUESTS and "socket" in offered else list(offered)


def applies(point: Point, fabric: Fabric, ready: messages.Ready, offered: Sequence[str]) -> str:
    """The limit that a point is held against; empty where none is known.

    Where UCX chooses its own way on one host, that is copying through shared memory at best, so memcpy is the limit.
    """
    wanted = _wanted(point, fabric, ready)
    return wanted if wanted in offered or wanted not in ("memcpy", "socket") else ""


def _wanted(point: Point, fabric: Fabric, ready: messages.Ready) -> str:
    if point.op in REQUESTS:
        return "socket"
    if ready.mapped or "memory copy" in ready.data_path:
        return "memcpy"
    tls = str(fabric.arguments().get("tls", ""))
    if _TCP_ONLY.fullmatch(tls) or re.search(r"\btcp\b", ready.data_path, re.IGNORECASE):
        return "socket"
    if fabric.name == "verbs" or _RDMA.search(tls) or _RDMA.search(ready.data_path):
        if point.op not in RAW:
            return ""
        return "ucx_perftest" if fabric.name == "ucx" else f"ib_{point.op}_bw"
    return "memcpy"
