"""Words for what a check of block headers found; the check itself is `memfabric._native.check_headers`."""

from __future__ import annotations

import enum


class HeaderCheck(enum.IntEnum):
    """Per block: the first check that failed; mirrors ``blocks.cpp``."""

    OK = 0
    TORN = 1
    """The header's own check value is wrong."""
    NOT_COMPLETE = 2
    OTHER_GENERATION = 3
    OTHER_KEY = 4
    WRONG_SIZE = 5
    """Another layout version, segment count or payload size."""
    DIGEST_MISMATCH = 6
    """The payload is not what the header says."""
    NOT_READ = 255
    """The copy did not happen (client only)."""
