"""The demonstration: a real language model whose prefill and decode share KV blocks through a pool.

`run_demo` starts everything, compares the tokens with a run without the pool, and fails when they differ. Importing
this package imports neither torch nor transformers; only the worker processes do.
"""

from memfabric.demo.report import DemoError, DemoOptions, DemoReport, RequestReport, TokensDifferError
from memfabric.demo.run import run_demo

__all__ = ["DemoError", "DemoOptions", "DemoReport", "RequestReport", "TokensDifferError", "run_demo"]
