"""Where an examination looks: the kernel's files, below roots that tests can replace, and this process's own rights.

Nothing here raises for what it reads: a file that is missing, unreadable or full of something else is None or empty,
and is read no further than `MOST_BYTES`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import resource
import zlib
from pathlib import Path

MOST_BYTES = 1 << 20
"""A kernel's configuration, the longest file that is read, has about 300 KiB."""
_PIECE_BYTES = 1 << 14
_GZIP = 16 + zlib.MAX_WBITS
UNLIMITED = -1
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
IPC_LOCK, SYS_PTRACE = 14, 19
"""Source: linux/capability.h."""
_NUMBER = re.compile(r"-?[0-9]{1,18}", re.ASCII)
_WHOLE_HOST = ("0", "0", "4294967295")
"""A process of the first user namespace; in another one its capabilities do not count for the whole host."""


@dataclasses.dataclass(frozen=True)
class Mount:
    """A file system: where it is mounted, its type and options."""

    place: str
    kind: str
    options: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class System:
    """The roots.

    Attributes:
        proc, sys, dev, boot: where these directories are.
        shared_memory: the directory that regions are kept in.
        limits: (soft, hard) limits of this process by name, `UNLIMITED` for none; None: ask the kernel.
    """

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    boot: Path = Path("/boot")
    shared_memory: Path = Path("/dev/shm")
    limits: dict[str, tuple[int, int]] | None = None

    def content(self, path: Path) -> bytes | None:
        """The beginning of a file."""
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe in its place is not waited for
        except (OSError, ValueError):
            return None
        content = b""
        try:
            while len(content) < MOST_BYTES and (piece := os.read(file, _PIECE_BYTES)):
                content += piece
        except OSError:
            return None
        finally:
            os.close(file)
        return content[:MOST_BYTES]

    def text(self, path: Path) -> str | None:
        """The beginning of a file as text, without white space around it."""
        content = self.content(path)
        return None if content is None else content.decode(errors="replace").strip()

    def number(self, path: Path) -> int | None:
        """The whole number that a file holds, if it is one of at most 18 digits."""
        return whole_number(self.text(path) or "")

    def names(self, path: Path) -> list[str]:
        """What is in a directory, in order; numbers by their value."""
        try:
            found = [entry.name for entry in path.iterdir()]
        except (OSError, ValueError):
            return []

        def place(name: str) -> tuple[bool, int, str]:
            number = whole_number(name)
            return number is None, number or 0, name

        return sorted(found, key=place)

    def link(self, path: Path) -> str:
        """The last part of where a symbolic link leads; empty where it is none."""
        try:
            return path.readlink().name
        except (OSError, ValueError):
            return ""

    def may_use(self, path: Path) -> bool:
        """Whether this process may open a file for reading and writing."""
        return os.access(path, os.R_OK | os.W_OK)

    def limit(self, name: str) -> tuple[int, int]:
        """(soft, hard) of ``RLIMIT_name``."""
        if self.limits is not None:
            return self.limits[name]
        return resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))

    def has_capability(self, bit: int) -> bool:
        """Whether this process has a capability that counts for the whole host."""
        if tuple((self.text(self.proc / "self/uid_map") or "").split()) != _WHOLE_HOST:
            return False
        value = self.field(self.proc / "self/status", "CapEff")
        return bool(re.fullmatch(r"[0-9a-f]{1,16}", value) and int(value, 16) >> bit & 1)

    def field(self, path: Path, name: str) -> str:
        """What follows ``name:`` in a file; empty where it is not there."""
        for line in (self.text(path) or "").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
        return ""

    def meminfo(self) -> dict[str, int]:
        """Numbers of /proc/meminfo: KiB, or counts."""
        found = {}
        for line in (self.text(self.proc / "meminfo") or "").splitlines():
            name, _, rest = line.partition(":")
            number = whole_number(" ".join(rest.split()[:1]))
            if number is not None and number >= 0:
                found[name.strip()] = number
        return found

    def mounts(self) -> list[Mount]:
        """The file systems, in the order they were mounted."""
        rows = [line.split() for line in (self.text(self.proc / "mounts") or "").splitlines()]
        return [Mount(words[1], words[2], tuple(words[3].split(","))) for words in rows if len(words) > 3]

    def mount_of(self, directory: Path) -> Mount | None:
        """The file system that holds a directory; None where it is not told."""
        found = None
        for mount in self.mounts():
            inside = mount.place.startswith("/") and directory.is_relative_to(mount.place)
            if inside and (found is None or len(mount.place) >= len(found.place)):  # a later one covers an earlier one
                found = mount
        return found

    def chosen(self, path: Path) -> str:
        """The word in brackets: ``always [madvise] never``."""
        for word in (self.text(path) or "").split():
            if word.startswith("[") and word.endswith("]"):
                return word[1:-1]
        return ""

    def kernel(self) -> tuple[int, int]:
        """(major, minor) of the running kernel; zeros where it is not told."""
        found = re.match(r"([0-9]{1,9})\.([0-9]{1,9})", self.text(self.proc / "sys/kernel/osrelease") or "", re.ASCII)
        return (int(found[1]), int(found[2])) if found else (0, 0)

    def kernel_options(self) -> dict[str, str]:
        """What the running kernel was built with, by ``CONFIG_…``: y, m, n or a value. Empty where it is not told."""
        text = None
        packed = self.content(self.proc / "config.gz")
        release = self.text(self.proc / "sys/kernel/osrelease") or ""
        if packed:
            try:
                text = zlib.decompressobj(_GZIP).decompress(packed, MOST_BYTES).decode(errors="replace")
            except zlib.error:
                text = None
        elif release and "/" not in release:
            text = self.text(self.boot / f"config-{release}")
        found = {}
        for line in (text or "").splitlines():
            if line.startswith("# CONFIG_") and line.endswith(" is not set"):
                found[line.split()[1]] = "n"
            elif line.startswith("CONFIG_"):
                name, _, value = line.partition("=")
                found[name] = value
        return found

    def reads_own_memory(self) -> bool:
        """Whether process_vm_readv works at all here, tried on this process itself."""
        source, target = ctypes.create_string_buffer(b"try"), ctypes.create_string_buffer(4)
        pieces = [(ctypes.c_void_p * 2)(ctypes.addressof(each), 4) for each in (target, source)]
        try:
            call = ctypes.CDLL(None, use_errno=True).process_vm_readv
        except (OSError, AttributeError):
            return False
        call.restype = ctypes.c_ssize_t
        call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
        return bool(call(os.getpid(), pieces[0], 1, pieces[1], 1, 0) == 4)


def whole_number(text: str) -> int | None:
    """A whole number of at most 18 digits; None for everything else."""
    return int(text) if _NUMBER.fullmatch(text) else None
