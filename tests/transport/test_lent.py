"""Regions that are lent: closing is done when it returns, for whoever calls it, or it is not done and says so."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from transport._lent import LentRegion
from transport.errors import TransportError

MEMORY = np.zeros(64, np.uint8)


def test_a_withdrawal_that_failed_is_tried_again() -> None:
    tries = 0

    def withdraw() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise TransportError("the device is busy")

    region = LentRegion(1, 64, MEMORY, b"d", withdraw)
    with pytest.raises(TransportError, match="busy"):
        region.close()
    region.close()
    region.close()
    assert tries == 2


def test_whoever_closes_second_returns_when_it_is_withdrawn() -> None:
    begun, go_on, withdrawn = threading.Event(), threading.Event(), threading.Event()

    def withdraw() -> None:
        begun.set()
        assert go_on.wait(30.0)
        withdrawn.set()

    region = LentRegion(1, 64, MEMORY, b"d", withdraw)
    first = threading.Thread(target=region.close)
    first.start()
    assert begun.wait(30.0)
    seen: list[bool] = []
    second = threading.Thread(target=lambda: (region.close(), seen.append(withdrawn.is_set())))
    second.start()
    second.join(0.2)
    assert not seen, "it returned while the memory could still be written"
    go_on.set()
    first.join()
    second.join()
    assert seen == [True]
