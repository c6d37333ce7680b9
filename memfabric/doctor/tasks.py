"""Work in a thread of its own that is waited for only so long, and whose errors are a result like others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Task(Generic[T]):
    """A call that runs at once, beside its maker.

    The thread is a daemon: one that hangs in the kernel keeps nobody from ending.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._found: list[T] = []
        self._trouble = ""
        self._started_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True, name="memfabric-doctor")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._call())
        except Exception as error:  # noqa: BLE001  # one check that fails must not hide what the others found
            self._trouble = f"it failed: {error!r}"

    def result(self, limit_s: float) -> tuple[T | None, str]:
        """(what the call returned, "") or (None, why there is nothing), `limit_s` after the start at the latest."""
        self._thread.join(max(0.0, self._started_s + limit_s - time.monotonic()))
        if self._found:
            return self._found[0], ""
        return None, self._trouble or f"it took longer than {limit_s:g} s"
