"""How much memory a region may still take on this machine, and why.

Reads the filesystem's free space, the kernel's estimate of available memory and the limits of the control groups this
process is in. Shared memory is charged to the control group of whoever touches it first, and running into that limit
kills a process instead of failing a call, so it has to be looked at beforehand.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

RESERVE_BYTES = 64 << 20
"""Left to the rest of the system, where running out would kill processes rather than fail a call."""

UNLIMITED = 1 << 62
"""Control groups without a limit report numbers beyond this (v1) or "max" (v2)."""


@dataclass(frozen=True)
class Room:
    """What one source says.

    Attributes:
        source: What limits, as words for a message.
        free_bytes: How much a region may take there.
        advice: What can be done about it.
    """

    source: str
    free_bytes: int
    advice: str


def _number(path: Path) -> int | None:
    try:
        text = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdecimal() else None


def _field(path: Path, name: str) -> int:
    """A field of memory.stat, 0 where it is missing."""
    try:
        lines = path.read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return 0
    for line in lines:
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdecimal():
            return int(value)
    return 0


def available_memory(proc: Path = Path("/proc")) -> Room | None:
    """The kernel's MemAvailable, less a reserve; None where it isn't told. Swap isn't counted."""
    try:
        lines = (proc / "meminfo").read_text("ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for line in lines:
        words = line.split()
        if len(words) >= 2 and words[0] == "MemAvailable:" and words[1].isdecimal():
            free = max(0, int(words[1]) * 1024 - RESERVE_BYTES)
            return Room("the machine's available memory", free, "lend less memory or stop other programs")
    return None


def _group_rooms(root: Path, group: str, version: int) -> list[Room]:
    """Limits of a control group and of all above it; a group that isn't visible here counts as the visible root."""
    limit_name, usage_name, reclaimable = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    at = root / group.lstrip("/")
    if ".." in at.parts or not at.is_dir():
        at = root
    rooms = []
    while True:
        limit, used = _number(at / limit_name), _number(at / usage_name)
        if limit is not None and used is not None and limit < UNLIMITED:
            # File cache is given back before anything is killed.
            used -= min(used, _field(at / "memory.stat", reclaimable))
            rooms.append(
                Room(
                    f"the memory limit of control group {at} ({limit} bytes)",
                    max(0, limit - used - RESERVE_BYTES),
                    "raise the container's memory limit or lend less memory",
                )
            )
        if at == root:
            return rooms
        at = at.parent


def control_group_rooms(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> list[Room]:
    """What the control groups of this process still allow; empty where nothing limits."""
    try:
        lines = (proc / "self" / "cgroup").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    rooms: list[Room] = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            rooms += _group_rooms(cgroup, group, 2)
        elif "memory" in controllers.split(","):
            rooms += _group_rooms(cgroup / "memory", group, 1)
    return rooms


def filesystem_room(directory: str | Path) -> Room:
    """Free space of the filesystem that backs shared memory."""
    status = os.statvfs(directory)
    return Room(
        f"free space in {directory}",
        status.f_bavail * status.f_frsize,
        f"enlarge it (mount -o remount,size=SIZE {directory}, docker run --shm-size=SIZE), remove files from it, "
        "or lend less memory",
    )


def tightest_room(directory: str | Path, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Room:
    """The smallest of all limits for a file in `directory`."""
    rooms = [filesystem_room(directory), *control_group_rooms(proc, cgroup)]
    memory = available_memory(proc)
    if memory is not None:
        rooms.append(memory)
    return min(rooms, key=lambda room: room.free_bytes)
