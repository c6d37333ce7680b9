"""Memory that is damaged from outside: superblocks, headers, payload. Reads report it, and never return it."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from memfabric.client import GetStatus
from memfabric.core.layout import SUPERBLOCK_BYTES, plan_region
from memfabric.core.messages import NamespaceSpec
from tests.processes import payload
from tests.processes.harness import MIB, MS, Pool
from tests.processes.load import Load

SPEC = NamespaceSpec(name="damage", block_bytes=16384, segments=4, high_ratio=1.0, low_ratio=1.0)
MEMORY = 2 * MIB
PLAN = plan_region(MEMORY, SPEC.block_bytes, SPEC.segments)
COUNT = 40


def _region(pool: Pool) -> np.memmap:  # type: ignore[type-arg]
    (path,) = pool.region_files()
    return np.memmap(path, np.uint8, "r+")


def _flip(region: np.memmap, offset: int) -> None:  # type: ignore[type-arg]
    region[offset] ^= 1 << (offset % 8)


@pytest.mark.parametrize("leased", [False, True], ids=["optimistic", "leased"])
@pytest.mark.parametrize("where", ["payload", "header", "headers", "all"])
def test_damage_is_reported_counted_dropped_and_repaired(tmp_path: Path, where: str, leased: bool) -> None:
    pick = random.Random(f"{where} {leased}")
    with Pool(tmp_path, SPEC, dead_ns=30_000 * MS) as pool:
        pool.start_node("a", MEMORY)
        pool.wait_nodes("a")
        with pool.connect() as client, pool.connect() as other:
            ids, keys = payload.chain(1, COUNT)
            assert client.put(keys, payload.fill_many(ids, 7, SPEC.block_bytes)).ok
            assert client.get(keys).ok and other.get(keys).ok
            region = _region(pool)
            if where == "payload":
                for block in range(0, PLAN.block_count, 3):
                    _flip(region, PLAN.block_offset(block) + pick.randrange(SPEC.block_bytes))
            elif where == "header":
                used = 64 + 8 * (SPEC.segments - 1)
                for block in range(0, PLAN.block_count, 3):
                    _flip(region, PLAN.header_offset(block) + pick.randrange(used))
            elif where == "headers":
                table = region[SUPERBLOCK_BYTES : SUPERBLOCK_BYTES + PLAN.headers_bytes]
                table[:] = np.frombuffer(pick.randbytes(len(table)), np.uint8)
            else:
                region[:] = 0
            result = client.get(keys, leased=leased)
            for position, key_id in enumerate(ids):
                if result.status[position] == GetStatus.OK:
                    assert payload.check(key_id, result.out[position]) == (7, "")
            bad = int((result.status == GetStatus.CORRUPT).sum())
            assert set(result.status.tolist()) <= {GetStatus.OK, GetStatus.CORRUPT}
            if where in ("headers", "all"):
                assert bad == COUNT
            else:
                assert COUNT // 3 - 2 <= bad <= COUNT // 3 + 2
            assert "verify" in result.message
            stats = client.stats()
            assert stats["corrupt_blocks"] == bad and stats["verification_retries"] == bad
            assert leased or stats["stale_places"] == bad
            # The server dropped them: everybody misses, and a put repairs.
            assert pool.namespace().counters["corrupt_blocks"] == bad
            again = other.get(keys)
            assert int((again.status == GetStatus.MISSING).sum()) == bad and again.found_count == COUNT - bad
            assert client.put(keys, payload.fill_many(ids, 8, SPEC.block_bytes)).stored_count == bad
            whole = other.get(keys)
            assert whole.ok
            for position, key_id in enumerate(ids):
                nonce, wrong = payload.check(key_id, whole.out[position])
                assert not wrong and nonce == (7 if result.status[position] == GetStatus.OK else 8)
        pool.shut_down()


def test_leases_and_views_notice_damage(tmp_path: Path) -> None:
    with Pool(tmp_path, SPEC, dead_ns=30_000 * MS) as pool:
        pool.start_node("a", MEMORY)
        pool.wait_nodes("a")
        with pool.connect() as client:
            ids, keys = payload.chain(1, 4)
            assert client.put(keys, payload.fill_many(ids, 7, SPEC.block_bytes)).ok
            region = _region(pool)
            with client.acquire(keys) as lease:
                assert all(lease.check(i) for i in range(4))
                size = SPEC.block_bytes // SPEC.segments
                for block in range(PLAN.block_count):
                    _flip(region, PLAN.block_offset(block) + 2 * size + 5)  # the third segment of every block
                assert not any(lease.check(i) for i in range(4))
                assert lease.read(segments=slice(0, 2)).ok, "the other segments are whole"
                assert lease.read(segments=slice(2, 3)).status.tolist() == [GetStatus.CORRUPT] * 4
        pool.shut_down()


def test_damaged_superblock_hurts_nobody_that_lives(tmp_path: Path) -> None:
    """Clients take the layout from the view; a superblock is for recovery, and the node writes it anew."""
    with Pool(tmp_path, SPEC, dead_ns=30_000 * MS) as pool:
        pool.start_node("a", MEMORY)
        pool.wait_nodes("a")
        with pool.connect() as client:
            ids, keys = payload.chain(1, 4)
            assert client.put(keys, payload.fill_many(ids, 7, SPEC.block_bytes)).ok
            _region(pool)[:SUPERBLOCK_BYTES] = 0xFF
            assert client.get(keys, leased=True).ok
        with pool.connect() as late:
            result = late.get(keys)
            assert result.ok and all(payload.check(i, result.out[n]) == (7, "") for n, i in enumerate(ids))
        pool.shut_down()


def test_region_file_removed_from_outside(tmp_path: Path) -> None:
    """Nobody can map it any more: unreachable, with a reason. Who has it mapped reads on."""
    with Pool(tmp_path, SPEC, dead_ns=30_000 * MS) as pool:
        pool.start_node("a", MEMORY)
        pool.wait_nodes("a")
        with pool.connect() as client:
            ids, keys = payload.chain(1, 4)
            assert client.put(keys, payload.fill_many(ids, 7, SPEC.block_bytes)).ok
            assert client.get(keys).ok
            (path,) = pool.region_files()
            path.unlink()
            assert client.get(keys).ok
            with pool.connect() as late:
                result = late.get(keys)
                assert result.status.tolist() == [GetStatus.UNREACHABLE] * 4 and "does not exist" in result.message
                put = late.put(payload.chain(2, 1)[1], np.zeros((1, SPEC.block_bytes), np.uint8))
                assert not put.ok and "does not exist" in put.message
        pool.shut_down()


def test_random_damage_under_load(tmp_path: Path, fault_seed: int) -> None:
    """Bits flip anywhere in the region while writers and readers work."""
    print(f"rerun with: MEMFABRIC_FAULT_SEED={fault_seed}")
    pick = random.Random(fault_seed)
    with Pool(tmp_path, SPEC, dead_ns=30_000 * MS, quarantine_ns=100 * MS) as pool:
        pool.start_node("a", MEMORY)
        pool.wait_nodes("a")
        load = Load(pool, seed=fault_seed, chains=10, chain_blocks=12).start(writers=1, readers=2)
        region = _region(pool)
        end_s = time.monotonic() + 3.0
        while time.monotonic() < end_s:
            for _ in range(5):
                start = SUPERBLOCK_BYTES if pick.random() < 0.5 else PLAN.data_offset
                end = PLAN.data_offset if start == SUPERBLOCK_BYTES else MEMORY
                _flip(region, pick.randrange(start, end))
            time.sleep(0.005)
        total = load.finish()
        assert total["get.CORRUPT"] > 0 and total["get.OK"] > 0
        counters = pool.namespace().counters
        assert counters["corrupt_blocks"] > 0
        pool.shut_down()
    print(dict(total))
