"""Everything here needs an RDMA device: it runs in the guest that `make test-rdma` boots."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.path).parents:
            item.add_marker(pytest.mark.rdma)
            if "RXE_VM" not in os.environ:
                item.add_marker(pytest.mark.skip(reason="needs an RDMA device: run `make test-rdma`"))
