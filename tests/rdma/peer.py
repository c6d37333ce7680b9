"""An independent peer for the verbs transport: Debian's pyverbs, and messages read as plain MessagePack.

Nothing of `transport` is used here, so that both sides cannot share a mistake.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyverbs.enums as e
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.mr import MR, MW, MWBindInfo
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

DEVICE = os.environ.get("RXE_VM_DEV", "rxe0")
GID_INDEX = int(os.environ.get("RXE_VM_GID_INDEX", "1"))
Memory = npt.NDArray[np.uint8]
_psn = itertools.count(1000)


def gid_text(raw: bytes) -> str:
    return ":".join(raw[at : at + 2].hex() for at in range(0, 16, 2))


def gid_bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


class Peer:
    """A device, and queue pairs on it."""

    def __init__(self) -> None:
        self.context = Context(name=DEVICE)
        self.pd = PD(self.context)
        self.gid = gid_bytes(str(self.context.query_gid(1, GID_INDEX).gid))

    def queue_pair(self, access: int) -> tuple[Any, Any, Any, int]:
        """A queue pair in its first state, its attributes, its completion queue, its packet sequence number."""
        cq = CQ(self.context, 64)
        cap = QPCap(max_send_wr=32, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
        init = QPInitAttr(qp_type=e.IBV_QPT_RC, scq=cq, rcq=cq, cap=cap, sq_sig_all=1)
        attr = QPAttr(port_num=1)
        attr.qp_access_flags = access
        return QP(self.pd, init, attr), attr, cq, next(_psn)

    def describe(self, qp: Any, psn: int) -> list[Any]:
        """As it stands in hellos and welcomes: number, sequence, lid, gid, mtu, reads."""
        return [qp.qp_num, psn, 0, self.gid, e.IBV_MTU_4096, 8]

    def join(self, qp: Any, attr: Any, psn: int, other: list[Any]) -> None:
        number, other_psn, _lid, gid, mtu, reads = other
        route = GlobalRoute(dgid=GID(gid_text(gid)), sgid_index=GID_INDEX, hop_limit=64)
        attr.ah_attr = AHAttr(is_global=1, gr=route, port_num=1)
        attr.dest_qp_num, attr.rq_psn, attr.sq_psn = number, other_psn, psn
        attr.path_mtu = min(mtu, e.IBV_MTU_4096)
        attr.max_rd_atomic = attr.max_dest_rd_atomic = min(8, reads)
        attr.min_rnr_timer, attr.timeout, attr.retry_cnt, attr.rnr_retry = 12, 14, 6, 0
        qp.to_rts(attr)


def completed(cq: Any, timeout_s: float = 20.0) -> int:
    """The status of the next completion."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        count, found = cq.poll(1)
        if count:
            return int(found[0].status)
    raise AssertionError("no completion")


class PeerOwner(Peer):
    """Lends memory to a client of the transport. With `window`, through a type-2 memory window that `fence` takes
    away by LOCAL_INV."""

    def __init__(self, memory: Memory, window: bool = False) -> None:
        super().__init__()
        self.memory = memory
        self.nonce = os.urandom(16)
        access = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE | e.IBV_ACCESS_REMOTE_READ
        self.access = access
        self.window = window
        self.told_key: int | None = None  # another key than the true one for clients
        bound = e.IBV_ACCESS_MW_BIND if window else 0
        self.mr = MR(self.pd, memory.size, access | bound, address=memory.ctypes.data)
        self.ends: list[tuple[Any, Any, Any, int]] = []

    def descriptor(self) -> bytes:
        return msgspec.msgpack.encode(["verbs", 1, self.nonce, 7, 9, self.memory.size, True, True])

    def accept(self, raw: bytes) -> bytes:
        version, owner, _writable, queue, regions = msgspec.msgpack.decode(raw)
        assert (version, owner) == (1, self.nonce)
        assert all(each == [7, 9] for each in regions)
        answer = None
        key = self.mr.rkey
        if queue is not None:
            self.drop()
            qp, attr, cq, psn = self.queue_pair(self.access)
            self.join(qp, attr, psn, queue)
            answer = self.describe(qp, psn)
            mw = self.bind(qp, cq) if self.window else None
            key = mw[1] if mw else key
            self.ends.append((qp, cq, mw[0] if mw else None, key))
        elif self.ends:
            key = self.ends[-1][3]
        piece = [0, self.memory.size, self.memory.ctypes.data, key if self.told_key is None else self.told_key]
        return msgspec.msgpack.encode([1, answer, [[piece] for _ in regions]])

    def bind(self, qp: Any, cq: Any) -> tuple[Any, int]:
        mw = MW(self.pd, e.IBV_MW_TYPE_2)
        rights = e.IBV_ACCESS_REMOTE_WRITE | e.IBV_ACCESS_REMOTE_READ
        wr = SendWR(opcode=e.IBV_WR_BIND_MW)
        wr.set_bind_wr(mw, MWBindInfo(self.mr, self.memory.ctypes.data, self.memory.size, rights))
        qp.post_send(wr)
        assert completed(cq) == e.IBV_WC_SUCCESS
        return mw, wr.rkey

    def fence(self) -> None:
        """LOCAL_INV: the window's key opens nothing any more, it is said."""
        qp, cq, _mw, key = self.ends[-1]
        qp.post_send(SendWR(opcode=e.IBV_WR_LOCAL_INV, imm_data=key))
        assert completed(cq) == e.IBV_WC_SUCCESS

    def drop(self) -> None:
        for qp, cq, mw, _key in self.ends:
            if mw is not None:
                mw.close()
            qp.close()
            cq.close()
        self.ends.clear()


class PeerClient(Peer):
    """Reads and writes what an owner of the transport lends."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self.memory = np.zeros(size_bytes, np.uint8)
        access = e.IBV_ACCESS_LOCAL_WRITE
        self.mr = MR(self.pd, size_bytes, access, address=self.memory.ctypes.data)

    def connect(self, descriptor: bytes, accept: Any, writable: bool) -> None:
        name, version, owner, region_id, serial, size_bytes, _lent_writable, ethernet = msgspec.msgpack.decode(
            descriptor
        )
        assert (name, version, ethernet) == ("verbs", 1, True)
        self.qp, attr, self.cq, psn = self.queue_pair(e.IBV_ACCESS_REMOTE_WRITE)
        hello = [1, owner, writable, self.describe(self.qp, psn), [[region_id, serial]]]
        version, queue, regions = msgspec.msgpack.decode(accept(msgspec.msgpack.encode(hello)))
        assert version == 1
        self.join(self.qp, attr, psn, queue)
        (self.pieces,) = regions
        assert sum(length for _, length, _, _ in self.pieces) == size_bytes

    def move(self, write: bool, local: int, remote: int, length: int, key: int | None = None) -> int:
        """One work request; its status."""
        offset, _, address, rkey = next(each for each in reversed(self.pieces) if each[0] <= remote)
        sge = SGE(self.memory.ctypes.data + local, length, self.mr.lkey)
        wr = SendWR(opcode=e.IBV_WR_RDMA_WRITE if write else e.IBV_WR_RDMA_READ, num_sge=1, sg=[sge])
        wr.set_wr_rdma(rkey if key is None else key, address + remote - offset)
        self.qp.post_send(wr)
        return completed(self.cq)
