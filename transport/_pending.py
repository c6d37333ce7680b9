"""Batches that native code brings to an end."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

from transport import _digests, base
from transport.base import Batch, Pending
from transport.errors import PeerLostError, TimedOutError, UnreachableError


class NativePending(Pending):
    """A batch whose native object has `poll`, `wait`, `abandon` and, once terminal, `failure`: (status, words)."""

    def __init__(self, batch: Batch, native: Any, write: bool, ended: Callable[[NativePending], None]) -> None:
        self._batch, self._native, self._write, self._ended = batch, native, write, ended
        self._settled = False

    def poll(self) -> bool:
        if not self._settled and self._native.poll():
            self._settle()
        return self._settled

    def wait(self) -> int:
        done: int = self._native.wait()
        self._settle()
        return done

    def abandon(self) -> int:
        done: int = self._native.abandon()
        self._settle()
        return done

    def _settle(self) -> None:
        if self._settled:
            return
        self._settled = True
        status, why = self._native.failure
        if status == base.DONE:
            self._batch.error = None
        elif status == base.PEER_LOST:
            self._batch.error = PeerLostError(why)
        elif status == base.TIMED_OUT or (status == base.NOT_DONE and "deadline" in why):
            self._batch.error = TimedOutError(why)
        else:
            self._batch.error = UnreachableError(why)
        if self._write:
            _digests.drop_unfinished(self._batch)
        else:
            _digests.fill(self._batch)
        self._ended(self)


class Posted:
    """Those of one transport that have not ended."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[NativePending] = weakref.WeakSet()

    def pending(self, batch: Batch, native: Any, write: bool) -> NativePending:
        """One more."""
        made = NativePending(batch, native, write, self._all.discard)
        self._all.add(made)
        return made

    def flush(self, end_ns: int) -> bool:
        """As `Transport.flush`, with an instant."""
        for pending in list(self._all):
            while not pending.poll():
                if time.monotonic_ns() >= end_ns:
                    return False
                time.sleep(0.0005)
        return True
