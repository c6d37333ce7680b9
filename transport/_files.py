"""Region files in a shared-memory directory: their names, who owns them, how the files of the dead are found.

Invariants:
- An owner holds an exclusive flock on its file from creation to release; the kernel drops it however the owner dies.
- A file is created and locked, or found unlocked and removed, only under the directory's flock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from transport.base import NAME_PATTERN
from transport.errors import RegionExistsError, TransportError

FILE = re.compile(rf"memfabric\.{NAME_PATTERN}\.[0-9a-f]{{1,16}}", re.ASCII)
DIRECTORY_LOCK_TIMEOUT_S = 5.0


@contextlib.contextmanager
def locked_directory(directory: str) -> Iterator[int]:
    """A file descriptor of the directory, with its flock held. Waits a bounded time for other starts and sweeps."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline_s = time.monotonic() + DIRECTORY_LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    raise TransportError(
                        f"another process has kept {directory} locked for {DIRECTORY_LOCK_TIMEOUT_S:g} s; "
                        f"nothing was changed. Find it with: fuser -v {directory}"
                    ) from None
                time.sleep(0.002)
        yield fd
    finally:
        os.close(fd)


def remove_if_dead(directory_fd: int, file: str) -> bool:
    """Removes a region file whose owner is gone. The directory's flock must be held."""
    try:
        # Non-blocking: what has the name of a region may be a pipe.
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory_fd)
    except OSError:
        return False
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            os.unlink(file, dir_fd=directory_fd)
        except OSError:
            return False
        return True
    finally:
        os.close(fd)


class Ownership:
    """The owner's file and its lock. Only the process that created it may give it up: a forked child shares both."""

    def __init__(self, directory: str, file: str, fd: int) -> None:
        self.directory = directory
        self.file = file
        self._fd = fd
        self._inode = os.fstat(fd).st_ino
        self._pid = os.getpid()
        self._guard = threading.Lock()

    def release(self, unlink: bool) -> None:
        if os.getpid() != self._pid:
            return
        with self._guard:
            fd, self._fd = self._fd, -1
        if fd < 0:
            return
        try:
            if unlink:
                path = Path(self.directory, self.file)
                with contextlib.suppress(FileNotFoundError):
                    if path.stat(follow_symlinks=False).st_ino == self._inode:
                        path.unlink()
            # Explicitly: mappings and forked children would keep the lock beyond the close.
            fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)


def create_file(directory: str, file: str, mode: int) -> tuple[Ownership, int]:
    """Creates an empty region file and locks it. A dead owner's file of that name is replaced.

    Returns:
        Its ownership, and the file descriptor, which stays the ownership's.

    Raises:
        RegionExistsError: A live process or another user has it; nothing was changed.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with locked_directory(directory) as directory_fd:
        try:
            fd = os.open(file, flags, 0o600, dir_fd=directory_fd)
        except FileExistsError:
            if not remove_if_dead(directory_fd, file):
                raise RegionExistsError(
                    f"{directory}/{file} belongs to a live process or to another user; choose another name"
                ) from None
            fd = os.open(file, flags, 0o600, dir_fd=directory_fd)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fchmod(fd, mode)
        return Ownership(directory, file, fd), fd


def remove_dead(directory: str) -> list[str]:
    """Removes every region file of this user whose owner is gone; returns their names, sorted."""
    with locked_directory(directory) as directory_fd, os.scandir(directory_fd) as entries:
        files = sorted(entry.name for entry in entries if FILE.fullmatch(entry.name))
        return [file for file in files if remove_if_dead(directory_fd, file)]
