"""Digests of a batch by a pass of its own over local memory, for transports that do not hash what they move."""

from __future__ import annotations

import numpy as np

from transport._native import digest, digest_batch
from transport.base import DONE, Batch

EMPTY = digest(b"")
"""Of a group without operations."""


def check_groups(batch: Batch) -> None:
    """Refuse what `fill` could not do, before anything is posted.

    Raises:
        ValueError: the groups are not as `Batch` describes them.
    """
    if batch.group is None:
        return
    count = 0 if batch.digest is None else len(batch.digest)
    if len(batch.group) != len(batch):
        raise ValueError(f"column group has {len(batch.group)} entries, expected {len(batch)}")
    used = batch.group[batch.group != -1]
    if len(used) and (used[0] < 0 or int(used.max()) >= count or (np.diff(used) < 0).any()):
        raise ValueError(f"groups must not decrease and be -1 or below {count}, the number of digests")


def fill_posted(batch: Batch) -> None:
    """Fill the digest column from local memory, whatever becomes of the operations."""
    if batch.digest is None:
        return
    batch.digest[:] = EMPTY
    if batch.group is not None and len(batch):
        digest_batch(batch.local, batch.length, batch.group, batch.digest)


def drop_unfinished(batch: Batch) -> None:
    """A group that is not done whole gets 0; for a batch that is terminal."""
    if batch.digest is None or batch.group is None:
        return
    unfinished = (batch.status != DONE) & (batch.group >= 0)
    if unfinished.any():
        batch.digest[batch.group[unfinished]] = 0


def fill(batch: Batch) -> None:
    """Fill the digest column of a read that is terminal."""
    fill_posted(batch)
    drop_unfinished(batch)
