"""memfabric itself: version, optional parts, and how it computes digests."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib import metadata

from memfabric.core.messages import PROTOCOL_VERSION
from memfabric.doctor.findings import Finding, Severity, shown
from memfabric.doctor.system import System
from transport import implementations

_NAME = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)")
_EXTRA = re.compile(r"""extra\s*==\s*["']([A-Za-z0-9._-]+)["']""")
_FOR_USERS = ("ucx", "demo", "bench")


def software(_system: System) -> Iterator[Finding]:
    """Version and extras."""
    try:
        version = metadata.version("memfabric")
        extras = installed_extras(metadata.requires("memfabric") or [])
    except metadata.PackageNotFoundError:
        version, extras = "(run from a source tree)", {}
    present = [name for name, complete in extras.items() if complete]
    missing = [name for name, complete in extras.items() if not complete and name in _FOR_USERS]
    words = f"{shown(version)}, protocol {PROTOCOL_VERSION}, Python {platform.python_version()}"
    words += f"; extras: {', '.join(present) or 'none'}"
    fix = (f"pip install 'memfabric[{','.join(missing)}]' # only if they are wanted",) if missing else ()
    why = f"optional parts that are not installed: {', '.join(missing)}" if missing else ""
    yield Finding("memfabric", Severity.INFO if missing else Severity.OK, words, why, fix)
    best = implementations()[0]
    if best == "scalar":
        yield Finding(
            "digests",
            Severity.WARNING,
            "computed by portable code",
            "every block that is read is checked; this processor or build has no wide instructions for it",
        )
    else:
        yield Finding("digests", Severity.OK, f"computed with {best}")


def installed_extras(requirements: list[str]) -> dict[str, bool]:
    """Each extra, and whether all that it needs is installed, in any version.

    Args:
        requirements: as in a package's metadata: ``name>=1; extra == "x"``. What cannot be read is passed over.
    """
    found: dict[str, bool] = {}
    for requirement in requirements:
        needs, _, condition = requirement.partition(";")
        name, extra = _NAME.match(needs), _EXTRA.search(condition)
        if name and extra:
            found[extra[1]] = found.get(extra[1], True) and (name[1] == "memfabric" or _is_installed(name[1]))
    return found


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
