"""Benchmarks: what memfabric costs, as ratios to limits measured in the same run.

`python -m perf.bench` runs them. They report and never fail on time. What is measured is the installed memfabric, as a
user has it: the directory that holds this package goes to the end of the module path, so that the source tree, which
has no native parts of its own, is taken only where nothing is installed.
"""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""

_elsewhere = [entry for entry in sys.path if entry and Path(entry).resolve() != ROOT]
if importlib.machinery.PathFinder.find_spec("memfabric", _elsewhere) is not None:
    sys.path[:] = [*_elsewhere, str(ROOT)]
