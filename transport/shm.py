"""Shared memory on one host: a region is a file in /dev/shm, clients map it and copy.

The node holds an exclusive flock on its file for as long as it lives; the kernel drops it however the node dies, so
`sweep` can tell what nobody owns any more. A flock on the directory, held briefly, orders "create and lock" against
"find unlocked and remove": without it a file could be swept between its creation and its lock.

What this transport can't do: it detects no failure of the other side (the bytes of a dead node stay readable for those
who mapped them) and has no fence (whoever mapped a region for writing can write until it disconnects).

Invariants:
- A file is removed only by its owner, or with its flock held.
- A descriptor leads to exactly the file it was made for (host, device, inode, size), or to an error.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec

from transport import base
from transport._files import FILE, Ownership, create_file, remove_dead
from transport._memory import tightest_room
from transport._native import Mapping, Mappings
from transport.base import Batch, Capabilities, Exchange, Finished, Pending, Region, Transport, UInt8Column
from transport.errors import (
    DescriptorError,
    NotConnectedError,
    NotWritableError,
    OutOfMemoryError,
    TimedOutError,
    UnreachableError,
    UnsupportedError,
)

_STEP_BYTES = 64 << 20
_MAX_REGION_BYTES = 1 << 46

_CAPABILITIES = Capabilities(
    name="shm",
    one_sided=True,
    data_path="memory copy",
    hosts=False,
    inline_digest=True,
    ordered=True,
    zero_copy=True,
    fences=frozenset(),
    detects=frozenset(),
    kinds=frozenset({"cpu"}),
    region_kinds=frozenset(),
    needs_exchange=False,
    max_region_bytes=_MAX_REGION_BYTES,
    max_operation_bytes=_MAX_REGION_BYTES,
)


class _Descriptor(msgspec.Struct, frozen=True):
    """What stands in a descriptor."""

    transport: str
    path: str
    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=_MAX_REGION_BYTES)]
    device: Annotated[int, msgspec.Meta(ge=0)]
    inode: Annotated[int, msgspec.Meta(ge=0)]
    boot_id: str


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Descriptor)


@functools.cache
def _boot_id() -> str:
    """Names this boot of this kernel; the same in all containers of a host. Empty where a sandbox hides it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


class ShmRegion(Region):
    """A region that this process owns. Removed when it is closed, collected, or the interpreter exits."""

    def __init__(self, region_id: int, mapping: Mapping, descriptor: bytes, ownership: Ownership) -> None:
        self.region_id = region_id
        self.size_bytes = mapping.size_bytes
        self.buffer = mapping.array(True)
        self.descriptor = descriptor
        self._ownership = ownership
        self._finalizer = weakref.finalize(self, ownership.release, True)

    def close(self, unlink: bool = True) -> None:
        self._finalizer.detach()
        self._ownership.release(unlink)

    def __repr__(self) -> str:
        return f"<ShmRegion {self._ownership.file}, {self.size_bytes} bytes>"


class ShmTransport(Transport):
    """See the module. One instance serves any number of threads, as node, as client, or both.

    Args:
        directory: Where region files are; must be the same, literally, at node and client.
    """

    __slots__ = ("_copy", "_directory", "_guard", "_handles", "_mappings")

    def __init__(self, directory: str | os.PathLike[str] = "/dev/shm") -> None:
        super().__init__()
        self._directory = os.fspath(directory).rstrip("/") or "/"
        self._mappings = Mappings()
        self._copy = self._mappings.copy
        self._handles: set[int] = set()
        self._guard = threading.Lock()

    @property
    def capabilities(self) -> Capabilities:
        return _CAPABILITIES

    # Node side

    def create_region(
        self,
        name: str,
        region_id: int,
        size_bytes: int,
        *,
        mode: int = 0o600,
        progress: Callable[[int], None] | None = None,
    ) -> ShmRegion:
        if not base.NAME.fullmatch(name):
            raise ValueError(f"region name {name!r} must be 1 to 64 of A-Z a-z 0-9 . _ - without a leading dot")
        if not 0 <= region_id < 1 << 64:
            raise ValueError(f"region_id {region_id} must be from 0 to 2^64 - 1")
        if not 1 <= size_bytes <= _MAX_REGION_BYTES:
            raise ValueError(f"size_bytes {size_bytes} must be from 1 to {_MAX_REGION_BYTES}")
        file = f"memfabric.{name}.{region_id:x}"
        room = tightest_room(self._directory)
        if room.free_bytes < size_bytes:
            raise OutOfMemoryError(
                f"region {file} needs {size_bytes} bytes, but {room.source} allows only {room.free_bytes} more; "
                f"nothing was created. {room.advice[0].upper()}{room.advice[1:]}."
            )
        ownership, fd = create_file(self._directory, file, mode)
        try:
            self._back(fd, file, size_bytes, progress)
            mapping = Mapping(fd, size_bytes, True)
            status = os.fstat(fd)
            path = f"{self._directory}/{file}"
            descriptor = _encoder.encode(_Descriptor("shm", path, size_bytes, status.st_dev, status.st_ino, _boot_id()))
            return ShmRegion(region_id, mapping, descriptor, ownership)
        except BaseException:
            ownership.release(True)
            raise

    def _back(self, fd: int, file: str, size_bytes: int, progress: Callable[[int], None] | None) -> None:
        """Takes the memory in steps, between which signals and `progress` get their turn."""
        backed = 0
        while backed < size_bytes:
            step = min(_STEP_BYTES, size_bytes - backed)
            try:
                os.posix_fallocate(fd, backed, step)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
                    raise
                room = tightest_room(self._directory)
                raise OutOfMemoryError(
                    f"region {file} needs {size_bytes} bytes, but memory ran out after {backed} "
                    f"({error.strerror}; {room.source} has {room.free_bytes} bytes left); nothing was kept. "
                    f"{room.advice[0].upper()}{room.advice[1:]}."
                ) from error
            backed += step
            if progress is not None:
                progress(backed)

    def sweep(self) -> list[str]:
        return remove_dead(self._directory)

    # Client side

    def connect(
        self, descriptor: bytes, *, writable: bool, exchange: Exchange | None = None, deadline_ns: int = 0
    ) -> int:
        told, file = self._decode(descriptor)
        here = _boot_id()
        # Where one side could not tell, the file's device, inode and size have to do.
        if told.boot_id and here and told.boot_id != here:
            raise UnreachableError(f"{told.path} is on another host, or this one was restarted since")
        mapping = self._map(told, file, writable)
        with self._guard:
            handle = self._mappings.attach(mapping)
            self._handles.add(handle)
        return handle

    def _decode(self, descriptor: bytes) -> tuple[_Descriptor, str]:
        try:
            if len(descriptor) > base.MAX_DESCRIPTOR_BYTES:
                raise DescriptorError(f"a descriptor of {len(descriptor)} bytes is too long")
            told = _decoder.decode(descriptor)
        except (msgspec.MsgspecError, UnicodeDecodeError, TypeError, RecursionError) as error:
            raise DescriptorError(f"not a descriptor of a shared-memory region: {error}") from error
        if told.transport != "shm":
            raise DescriptorError(f"a descriptor of transport {told.transport[:32]!r}, not of shm")
        directory, _, file = told.path.rpartition("/")
        if (directory or "/") != self._directory or not FILE.fullmatch(file):
            raise DescriptorError(f"{told.path[:256]!r} is not the path of a region in {self._directory}")
        return told, file

    def _map(self, told: _Descriptor, file: str, writable: bool) -> Mapping:
        access = os.O_RDWR if writable else os.O_RDONLY
        path = f"{self._directory}/{file}"
        try:
            fd = os.open(path, access | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise UnreachableError(
                f"{path} does not exist: its node has ended, or runs in a container with another {self._directory} "
                "(share it, for example with docker run --ipc=host)"
            ) from error
        except OSError as error:
            if writable and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise NotWritableError(f"{path} can't be opened for writing: {error.strerror}") from error
            raise UnreachableError(f"{path} can't be opened: {error.strerror}") from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise UnreachableError(f"{path} is not a regular file")
            if (status.st_dev, status.st_ino, status.st_size) != (told.device, told.inode, told.size_bytes):
                raise UnreachableError(f"{path} is not the file that the descriptor was made for; that one is gone")
            return Mapping(fd, told.size_bytes, writable)
        except OSError as error:
            raise UnreachableError(f"{path} can't be mapped: {error.strerror}") from error
        finally:
            os.close(fd)

    def disconnect(self, handle: int) -> None:
        with self._guard:
            known = handle in self._handles
            self._handles.discard(handle)
        if not known or not self._mappings.detach(handle):
            raise NotConnectedError(f"handle {handle} is not connected")

    def prefault(self, handle: int) -> None:
        """Enters all pages of a region into this process's page tables, so that no later copy has to.

        Optional, and may run in a thread of its own beside copies; the handle may be disconnected meanwhile. Takes
        about 0.15 s per GiB for a read-only and 0.25 s for a writable connection, and 2 MiB of page tables per GiB.
        Without it the first copy to or from each page pays: 64 KiB took 11 rather than 6 µs to read and 35 rather than
        4 µs to write. (Measured on Zen 4 in a busy virtual machine, without huge pages.)

        Raises:
            NotConnectedError: No such handle.
        """
        mapping = self._mappings.find(handle)
        if mapping is None:
            raise NotConnectedError(f"handle {handle} is not connected")
        # In steps, for Ctrl-C.
        for offset in range(0, mapping.size_bytes, _STEP_BYTES):
            mapping.prefault(offset, min(_STEP_BYTES, mapping.size_bytes - offset))

    def mapped(self, handle: int) -> UInt8Column:
        mapping = self._mappings.find(handle)
        if mapping is None:
            raise NotConnectedError(f"handle {handle} is not connected")
        return mapping.array(False)

    def post_read(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> Pending:
        return Finished(self.read(batch, deadline_ns, threads))

    def post_write(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> Pending:
        return Finished(self.write(batch, deadline_ns, threads))

    def read(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> int:
        return self._run(False, batch, deadline_ns, threads)

    def write(self, batch: Batch, deadline_ns: int = 0, threads: int = 0) -> int:
        return self._run(True, batch, deadline_ns, threads)

    def _run(self, write: bool, batch: Batch, deadline_ns: int, threads: int) -> int:
        if batch.kind != "cpu":
            raise UnsupportedError(f"shm copies from and to CPU memory only, not {batch.kind!r}")
        done = self._copy(
            write,
            batch.local,
            batch.region,
            batch.offset,
            batch.length,
            batch.group,
            batch.digest,
            batch.status,
            deadline_ns,
            threads,
        )
        if done < 0:
            raise base.refusal("write" if write else "read", batch, -done, self.size_of)
        if done < len(batch):
            batch.error = TimedOutError(f"the deadline passed after {done} of {len(batch)} operations")
        else:
            batch.error = None
        return done

    def size_of(self, handle: int) -> int:
        mapping = self._mappings.find(handle)
        return 0 if mapping is None else mapping.size_bytes

    def close(self) -> None:
        with self._guard:
            handles, self._handles = self._handles, set()
        for handle in handles:
            self._mappings.detach(handle)
