"""What README and docs say about the repository is true."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_every_dependency_is_justified() -> None:
    table = (ROOT / "docs" / "dependencies.md").read_text()
    project = (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[0]
    names = set(re.findall(r'"([a-z][a-z0-9-]*)(?=[><=\[])', project)) - {"memfabric"}
    assert {"msgspec", "torch", "ruff", "nanobind"} <= names
    missing = {name for name in names if not re.search(rf"\b{re.escape(name)}\b", table)}
    assert not missing
