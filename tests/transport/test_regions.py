"""Node side: creating, backing, owning and sweeping regions."""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from tests.transport.conftest import Script
from transport import OutOfMemoryError, RegionExistsError, ShmTransport, TransportError
from transport import _files as files
from transport._memory import (
    RESERVE_BYTES,
    available_memory,
    control_group_rooms,
    filesystem_room,
    tightest_room,
)

OWNER = """
import sys
from transport import ShmTransport
region = ShmTransport(sys.argv[1]).create_region(sys.argv[2], int(sys.argv[3]), 1 << 20)
region.buffer[:] = 42
print(region.descriptor.hex(), flush=True)
sys.stdin.read()
"""


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_region_is_backed_zeroed_and_gone_after_close(shm: ShmTransport, directory: Path) -> None:
    size = (1 << 20) + 5
    region = shm.create_region("node-0.a_b", 0x1F, size)
    path = directory / "memfabric.node-0.a_b.1f"
    status = path.stat()
    assert (region.region_id, region.size_bytes, region.buffer.size) == (0x1F, size, size)
    assert region.buffer.flags.writeable
    assert not region.buffer.any()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == size
    assert status.st_blocks * 512 >= size, "every page is backed"
    view = region.buffer
    region.close()
    region.close()
    assert names(directory) == []
    view[:] = 1  # still mapped, as somebody refers to it


def test_mode_is_what_was_asked_for_whatever_the_umask(shm: ShmTransport, directory: Path) -> None:
    before = os.umask(0o077)
    try:
        with shm.create_region("node", 0, 1, mode=0o660):
            assert stat.S_IMODE((directory / "memfabric.node.0").stat().st_mode) == 0o660
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "name", ["", ".hidden", "..", "a/b", "../a", "a b", "a\n", "ä", "a\0b", "x" * 65, "/etc/passwd"]
)
def test_names_with_tricks_are_refused(shm: ShmTransport, directory: Path, name: str) -> None:
    with pytest.raises(ValueError, match="region name"):
        shm.create_region(name, 0, 4096)
    assert names(directory) == []


@pytest.mark.parametrize(("region_id", "size"), [(-1, 1), (1 << 64, 1), (0, 0), (0, -1), (0, 1 << 62)])
def test_numbers_out_of_range_are_refused(shm: ShmTransport, directory: Path, region_id: int, size: int) -> None:
    with pytest.raises(ValueError, match="must be from"):
        shm.create_region("node", region_id, size)
    assert names(directory) == []


def test_largest_region_id(shm: ShmTransport, directory: Path) -> None:
    with shm.create_region("node", (1 << 64) - 1, 4096):
        assert names(directory) == ["memfabric.node.ffffffffffffffff"]
        assert shm.sweep() == []


def test_a_live_owner_keeps_its_name(shm: ShmTransport) -> None:
    with shm.create_region("node", 0, 4096) as region:
        region.buffer[:] = 7
        with pytest.raises(RegionExistsError, match=r"memfabric\.node\.0"):
            shm.create_region("node", 0, 4096)
        assert (region.buffer == 7).all()


def test_close_without_unlink_leaves_it_to_sweep(shm: ShmTransport, directory: Path) -> None:
    region = shm.create_region("node", 0, 4096)
    region.close(unlink=False)
    assert names(directory) == ["memfabric.node.0"]
    assert shm.sweep() == ["memfabric.node.0"]


def test_a_dead_owners_name_is_taken_over(shm: ShmTransport) -> None:
    shm.create_region("node", 0, 4096).close(unlink=False)
    with shm.create_region("node", 0, 8192) as region:
        assert not region.buffer.any()


def test_collected_region_is_removed(shm: ShmTransport, directory: Path) -> None:
    shm.create_region("node", 0, 4096)
    assert names(directory) == []


def test_region_is_removed_at_a_normal_exit(directory: Path, script: Script) -> None:
    owner = script(OWNER, directory, "node", 0)
    assert owner.stdout is not None
    owner.stdout.readline()
    assert names(directory) == ["memfabric.node.0"]
    owner.communicate("")
    assert owner.returncode == 0
    assert names(directory) == []


def test_sweep_removes_what_a_killed_owner_left_and_nothing_else(
    shm: ShmTransport, directory: Path, script: Script
) -> None:
    owners = [script(OWNER, directory, "node", k) for k in range(2)]
    for owner in owners:
        assert owner.stdout is not None
        owner.stdout.readline()
    mine = shm.create_region("mine", 0, 4096)
    strangers = ["memfabric.node.XYZ", "memfabric.0", "memfabric..node.0", "other.node.0", "memfabric.node.0.tmp"]
    for stranger in strangers:
        (directory / stranger).write_bytes(b"x")
    (directory / "memfabric.link.0").symlink_to(directory / strangers[0])
    (directory / "memfabric.directory.0").mkdir()
    os.mkfifo(directory / "memfabric.pipe.0")
    kept = [*strangers, "memfabric.link.0", "memfabric.directory.0", "memfabric.pipe.0", "memfabric.mine.0"]
    assert shm.sweep() == []
    owners[0].kill()
    owners[0].wait()
    assert shm.sweep() == ["memfabric.node.0"]
    assert names(directory) == sorted([*kept, "memfabric.node.1"])
    owners[1].communicate("")
    (directory / "memfabric.directory.0").rmdir()
    for name in [*strangers, "memfabric.link.0", "memfabric.pipe.0"]:
        (directory / name).unlink()
    mine.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_sweep_leaves_files_of_other_users(shm: ShmTransport, directory: Path) -> None:
    path = directory / "memfabric.other.0"
    path.write_bytes(b"x")
    os.chown(path, 12345, -1)
    assert shm.sweep() == []
    with pytest.raises(RegionExistsError):
        shm.create_region("other", 0, 4096)
    path.unlink()


def test_creation_and_sweep_at_once(shm: ShmTransport) -> None:
    stop = threading.Event()
    swept: list[str] = []

    def sweep() -> None:
        while not stop.is_set():
            swept.extend(shm.sweep())

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for k in range(200):
            with shm.create_region("node", k % 3, 4096) as region:
                region.buffer[:] = 1
    finally:
        stop.set()
        sweeper.join()
    assert swept == []


def test_a_directory_that_stays_locked_is_reported(
    shm: ShmTransport, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "DIRECTORY_LOCK_TIMEOUT_S", 0.02)
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(TransportError, match="locked"):
            shm.create_region("node", 0, 4096)
        with pytest.raises(TransportError, match="locked"):
            shm.sweep()
    finally:
        os.close(fd)
    assert names(directory) == []


def test_forked_child_does_not_take_the_region_along(shm: ShmTransport, directory: Path) -> None:
    with shm.create_region("node", 0, 4096) as region:
        child = os.fork()
        if child == 0:
            region.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert names(directory) == ["memfabric.node.0"]
        assert shm.sweep() == [], "the lock is still held"


def test_too_large_is_refused_with_numbers_and_advice(shm: ShmTransport, directory: Path) -> None:
    size = 1 << 45
    with pytest.raises(OutOfMemoryError) as refused:
        shm.create_region("node", 0, size)
    message = str(refused.value)
    assert str(size) in message
    assert "nothing was created" in message
    assert "memory" in message
    assert names(directory) == []


def test_running_out_halfway_leaves_nothing(directory: Path, script: Script) -> None:
    # A file-size limit makes the kernel refuse in the middle, just as a full filesystem does.
    process = script(
        """
import resource, sys
from transport import OutOfMemoryError, ShmTransport
resource.setrlimit(resource.RLIMIT_FSIZE, (80 << 20, 80 << 20))
steps = []
try:
    ShmTransport(sys.argv[1]).create_region("node", 0, 130 << 20, progress=steps.append)
except OutOfMemoryError as error:
    print(steps, error)
""",
        directory,
    )
    out, _ = process.communicate()
    assert out.startswith(
        f"[{64 << 20}] region memfabric.node.0 needs {130 << 20} bytes, but memory ran out after {64 << 20}"
    )
    assert "nothing was kept" in out
    assert names(directory) == []


def test_progress_is_told_and_can_stop_the_creation(shm: ShmTransport, directory: Path) -> None:
    steps: list[int] = []
    size = (64 << 20) + 4096
    shm.create_region("node", 0, size, progress=steps.append).close()
    assert steps == [64 << 20, size]

    def interrupt(backed: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shm.create_region("node", 0, size, progress=interrupt)
    assert names(directory) == []
    shm.create_region("node", 0, 4096).close()


def write_tree(root: Path, tree: dict[str, str]) -> None:
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_available_memory(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    write_tree(tmp_path, {"meminfo": "MemTotal:  9 kB\nMemAvailable:     1048576 kB\n"})
    room = available_memory(tmp_path)
    assert room is not None
    assert room.free_bytes == (1 << 30) - RESERVE_BYTES


def test_control_group_v2_limits_of_every_level(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "cgroup/pod/memory.max": f"{1 << 30}\n",
            "cgroup/pod/memory.current": f"{600 << 20}\n",
            "cgroup/pod/memory.stat": f"anon 5\ninactive_file {100 << 20}\n",
            "cgroup/pod/box/memory.max": "max\n",
            "cgroup/pod/box/memory.current": "5\n",
        },
    )
    rooms = control_group_rooms(tmp_path / "proc", tmp_path / "cgroup")
    assert [room.free_bytes for room in rooms] == [(1 << 30) - (500 << 20) - RESERVE_BYTES]
    assert "pod" in rooms[0].source


def test_control_group_v2_seen_from_inside_a_container(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../elsewhere\n",
            "cgroup/memory.max": f"{256 << 20}\n",
            "cgroup/memory.current": f"{250 << 20}\n",
        },
    )
    rooms = control_group_rooms(tmp_path / "proc", tmp_path / "cgroup")
    assert [room.free_bytes for room in rooms] == [0]


def test_control_group_v1(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,memory:/box\n3:pids:/box\n",
            "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "cgroup/memory/memory.usage_in_bytes": "1\n",
            "cgroup/memory/box/memory.limit_in_bytes": f"{1 << 30}\n",
            "cgroup/memory/box/memory.usage_in_bytes": f"{1 << 29}\n",
        },
    )
    rooms = control_group_rooms(tmp_path / "proc", tmp_path / "cgroup")
    assert [room.free_bytes for room in rooms] == [(1 << 29) - RESERVE_BYTES]


def test_unreadable_or_strange_control_groups_limit_nothing(tmp_path: Path) -> None:
    assert control_group_rooms(tmp_path, tmp_path) == []
    write_tree(tmp_path, {"self/cgroup": "0::/x\nnonsense\n", "memory.max": "lots\n", "memory.current": "-1\n"})
    assert control_group_rooms(tmp_path, tmp_path) == []


def test_the_tightest_limit_counts(tmp_path: Path, directory: Path) -> None:
    write_tree(tmp_path, {"meminfo": "MemAvailable: 131072 kB\n", "self/cgroup": "0::/\n", "memory.max": "max\n"})
    room = tightest_room(directory, tmp_path, tmp_path)
    assert room.free_bytes == (128 << 20) - RESERVE_BYTES
    assert tightest_room(directory).free_bytes <= filesystem_room(directory).free_bytes


def test_import_does_nothing_else(script: Script) -> None:
    process = script(
        """
import os, sys
import numpy, msgspec  # what they start is not ours
before, threads = dict(os.environ), os.listdir("/proc/self/task")
import transport
print(dict(os.environ) == before)
print(os.listdir("/proc/self/task") == threads)
print(not any(name.partition(".")[0] == "memfabric" for name in sys.modules))
"""
    )
    assert process.communicate()[0].split() == ["True"] * 3
