"""What workers did and saw, in files that survive kill -9 of the worker; and the check over all of them.

Writers record an attempt before they ask for it and its outcome after; readers record each (key, nonce) when they see
it first. A read is right only if some writer attempted exactly that, and was not told that it did not happen.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ATTEMPT, STORED, NOT_STORED, SEEN = 0, 1, 2, 3
_RECORD = struct.Struct("<BIQ")


class Recorder:
    """Appends to one worker's file, unbuffered: what was recorded is there whatever happens to the process."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._seen: set[tuple[int, int]] = set()

    def attempt(self, ids: Iterable[int], nonce: int) -> None:
        self._write((ATTEMPT, i, nonce) for i in ids)

    def outcome(self, ids: Iterable[int], nonce: int, stored: Iterable[bool]) -> None:
        self._write((STORED if done else NOT_STORED, i, nonce) for i, done in zip(ids, stored, strict=True))

    def seen(self, key_id: int, nonce: int) -> None:
        if (key_id, nonce) not in self._seen:
            self._seen.add((key_id, nonce))
            self._write([(SEEN, key_id, nonce)])

    def _write(self, records: Iterable[tuple[int, int, int]]) -> None:
        os.write(self._fd, b"".join(_RECORD.pack(*record) for record in records))


def judge(directory: Path) -> Counter[str]:
    """Hold everything seen against everything attempted.

    Raises:
        AssertionError: a read returned what nobody attempted, or what its writer was told did not happen.
    """
    attempted: set[tuple[int, int]] = set()
    refused: set[tuple[int, int]] = set()
    stored: set[tuple[int, int]] = set()
    seen: dict[tuple[int, int], str] = {}
    for path in sorted(directory.glob("*.records")):
        raw = path.read_bytes()
        for kind, key_id, nonce in _RECORD.iter_unpack(raw[: len(raw) // _RECORD.size * _RECORD.size]):
            {ATTEMPT: attempted, STORED: stored, NOT_STORED: refused}.get(kind, set()).add((key_id, nonce))
            if kind == SEEN:
                seen[key_id, nonce] = path.name
    wrong = []
    for (key_id, nonce), reader in seen.items():
        if (key_id, nonce) not in attempted:
            wrong.append(f"{reader} read key {key_id:#x} nonce {nonce:#x}, which nobody wrote")
        elif (key_id, nonce) in refused:
            wrong.append(f"{reader} read key {key_id:#x} nonce {nonce:#x}, whose writer was told that it is not stored")
    assert not wrong, f"{len(wrong)} wrong reads: " + "; ".join(wrong[:5])
    return Counter(attempted=len(attempted), stored=len(stored), refused=len(refused), seen=len(seen))
