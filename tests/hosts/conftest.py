"""Everything here needs network namespaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from memfabric.testing.hosts import why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    mine = [item for item in items if here in Path(item.path).parents]
    reason = why_not() if mine else ""
    for item in mine:
        item.add_marker(pytest.mark.processes)
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"network namespaces cannot be made here: {reason}"))
