"""The embedded file store: the epoch and the namespaces of a metadata server, kept over restarts.

One server at a time uses a directory: it holds a lock on it. Files are replaced atomically. Only configuration is
here; blocks are described by their regions.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import msgspec

from memfabric.core.messages import NamespaceSpec
from memfabric.errors import UnavailableError, UsageError

_EPOCH_ZERO_S = 1_704_067_200
"""2024-01-01T00:00:00Z: epochs without a store are seconds since then, which fit 32 bits until 2160."""


class _Stored(msgspec.Struct, frozen=True):
    epoch: int
    namespaces: list[NamespaceSpec]


class FileStore:
    """Configuration in a directory, or nowhere (`directory` None: a wall-clock epoch, no namespaces)."""

    def __init__(self, directory: Path | None) -> None:
        """Lock the directory, read what is there and write the new epoch.

        Raises:
            UnavailableError: another server uses the directory.
            UsageError: it cannot be created or read, or the file is damaged.
        """
        self._directory = directory
        self._lock: int | None = None
        self.epoch = max(1, int(time.time()) - _EPOCH_ZERO_S)
        self.namespaces: tuple[NamespaceSpec, ...] = ()
        if directory is None:
            return
        try:
            self._open(directory)
        except BaseException:
            self.close()
            raise

    def _open(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnavailableError(f"another metadata server uses the state directory {directory}") from None
        except OSError as error:
            raise UsageError(f"state directory {directory} cannot be used: {error}") from error
        stored = self._read()
        if stored is not None:
            self.epoch = max(self.epoch, stored.epoch + 1)
            self.namespaces = tuple(stored.namespaces)
        self.save(self.namespaces)

    def _read(self) -> _Stored | None:
        assert self._directory is not None
        path = self._directory / "server.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Stored)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise UsageError(
                f"{path} cannot be read ({error}); repair it, or remove it to start without namespaces"
            ) from error

    def save(self, specs: tuple[NamespaceSpec, ...]) -> None:
        """Replace what is kept; on disk when this returns."""
        self.namespaces = specs
        if self._directory is None:
            return
        path = self._directory / "server.json"
        fresh = path.with_suffix(".new")
        raw = msgspec.json.format(msgspec.json.encode(_Stored(self.epoch, list(specs))))
        with fresh.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)

    def close(self) -> None:
        """Give the directory free."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
