"""What the demonstration is asked and what it answers, as data. It knows no process, no model and no terminal."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memfabric.errors import MemfabricError, UsageError
from memfabric.units import MIB


class DemoError(MemfabricError):
    """The demonstration could not be carried out; the message says which part failed and why."""


class TokensDifferError(DemoError):
    """Tokens with reuse were not those without: the pool, or the engine connector, is wrong.

    Attributes:
        report: everything that was measured before.
    """

    def __init__(self, message: str, report: DemoReport) -> None:
        super().__init__(message)
        self.report = report


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """How to run the demonstration.

    Attributes:
        out_dir: where the plot and the report go; made if it is not there.
        cache_dir: where the converted model is kept; None: ``$MEMFABRIC_CACHE``, else ``$XDG_CACHE_HOME/memfabric``,
            else ``~/.cache/memfabric``.
        new_tokens: tokens to generate per request, at most; 1 to 512.
        block_tokens: tokens in a block, 1 to 256.
        repeats: how often each time to first token is measured (the median counts), with and without the pool.
        node_count: memory nodes to start.
        node_bytes, region_bytes: memory of each node, and its unit.
        shm_directory: where the nodes keep their memory; None: the pool's default.
        hosts: on two hosts (network namespaces of this machine) instead of one: the pool and prefill on the first,
            decode on the second, blocks over UCX and TCP. Needs root.
        step_timeout_s: how long one process may take for its part before the demonstration gives up.
        as_json: print the report as JSON on stdout instead of the table.
        quiet: no progress on stderr.
    """

    out_dir: Path = Path("out/demo")
    cache_dir: Path | None = None
    new_tokens: int = 48
    block_tokens: int = 16
    repeats: int = 3
    node_count: int = 2
    node_bytes: int = 256 * MIB
    region_bytes: int = 64 * MIB
    shm_directory: Path | None = None
    hosts: bool = False
    step_timeout_s: float = 900.0
    as_json: bool = False
    quiet: bool = False

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            UsageError: names the option and what it may be.
        """
        limits = {
            "new_tokens": (self.new_tokens, 512),
            "block_tokens": (self.block_tokens, 256),
            "repeats": (self.repeats, 100),
            "node_count": (self.node_count, 64),
        }
        for name, (value, most) in limits.items():
            if not 1 <= value <= most:
                raise UsageError(f"{name} must be 1 to {most}, got {value}")


@dataclasses.dataclass(frozen=True)
class RequestReport:
    """One request of the decode process, beside the same request without the pool.

    Attributes:
        name: of the prompt. `title`: for people.
        prompt_tokens: its length; `reused_tokens` of them were not computed but read.
        blocks_read, bytes_read: from the pool, in every repeat.
        blocks_written, bytes_written: what this request added to the pool.
        ttft_pool_s, ttft_cold_s: time to first token of each repeat, with and without the pool: from the tokenized
            prompt to the first token; finding and reading blocks included, loading the model not.
        load_s: the part of `ttft_pool_s` that is finding and reading blocks.
        tokens_pool, tokens_cold: what was generated; `text` is the former, decoded.
    """

    name: str
    title: str
    prompt_tokens: int
    reused_tokens: int
    blocks_read: int
    bytes_read: int
    blocks_written: int
    bytes_written: int
    ttft_pool_s: list[float]
    ttft_cold_s: list[float]
    load_s: list[float]
    tokens_pool: list[int]
    tokens_cold: list[int]
    text: str

    @property
    def pool_s(self) -> float:
        """Median time to first token with the pool."""
        return statistics.median(self.ttft_pool_s)

    @property
    def cold_s(self) -> float:
        """Median time to first token without it."""
        return statistics.median(self.ttft_cold_s)

    @property
    def speedup_ratio(self) -> float:
        """How many times sooner the first token is there."""
        return self.cold_s / self.pool_s

    @property
    def first_difference(self) -> int | None:
        """Position of the first generated token that differs; None when all are identical."""
        return first_difference(self.tokens_pool, self.tokens_cold)


@dataclasses.dataclass(frozen=True)
class PrefillReport:
    """What the prefill process did.

    Attributes:
        name, title: of its prompt.
        prompt_tokens: computed, all of them.
        blocks_written, bytes_written: into the pool.
        compute_s: to the first token. `put_s`: to store the blocks afterwards.
    """

    name: str
    title: str
    prompt_tokens: int
    blocks_written: int
    bytes_written: int
    compute_s: float
    put_s: float


@dataclasses.dataclass(frozen=True)
class DemoReport:
    """Everything that the demonstration found.

    Attributes:
        model, revision: what ran; `dtype` and `attention` how.
        block_tokens, block_bytes: of a block. `nodes`: memory nodes.
        hosts: how many hosts the processes were on. `transport`: how blocks got to the decode process.
        prefill, requests: what the processes did.
        pids: process ids by role: every role was a process of its own.
        versions: of what matters for the figures.
        plot: the picture's path.
        elapsed_s: of the whole demonstration; `setup_s` of it to get the model ready.
    """

    model: str
    revision: str
    dtype: str
    attention: str
    block_tokens: int
    block_bytes: int
    nodes: int
    hosts: int
    transport: str
    prefill: PrefillReport
    requests: list[RequestReport]
    pids: dict[str, int]
    versions: dict[str, str]
    plot: str
    setup_s: float
    elapsed_s: float

    @property
    def identical(self) -> bool:
        """Whether reuse changed no token of any request."""
        return all(request.first_difference is None for request in self.requests)

    def document(self) -> dict[str, Any]:
        """For JSON: all fields, and what is derived from them."""
        found = dataclasses.asdict(self)
        for entry, request in zip(found["requests"], self.requests, strict=True):
            entry.update(
                pool_s=request.pool_s,
                cold_s=request.cold_s,
                speedup_ratio=request.speedup_ratio,
                identical=request.first_difference is None,
                first_difference=request.first_difference,
            )
        found["identical"] = self.identical
        return found

    def check(self) -> None:
        """Hold the report against what the demonstration is to show.

        Raises:
            TokensDifferError: reuse changed a token. DemoError: nothing was written, or a request reused nothing.
        """
        for request in self.requests:
            at = request.first_difference
            if at is not None:
                raise TokensDifferError(_difference(request, at), self)
        if not self.prefill.blocks_written:
            raise DemoError("the prefill process wrote no block into the pool: nothing was shown")
        for request in self.requests:
            if not request.blocks_read:
                raise DemoError(f"request {request.name!r} read no block from the pool: nothing was shown")


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """First position where two sequences differ, the end of the shorter one included; None if they are equal."""
    for position, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return position
    return None if len(left) == len(right) else min(len(left), len(right))


def _difference(request: RequestReport, at: int) -> str:
    def around(tokens: list[int]) -> str:
        shown = " ".join(str(token) for token in tokens[max(0, at - 2) : at + 3])
        return f"… {shown} …" if tokens[at:] else f"… {shown} (ends)"

    return (
        f"TOKENS DIFFER: request {request.name!r}, new token {at} (counted from 0), after reuse of "
        f"{request.reused_tokens} of {request.prompt_tokens} prompt tokens.\n"
        f"  with the pool:    {around(request.tokens_pool)}\n"
        f"  without the pool: {around(request.tokens_cold)}\n"
        "Reuse must never change a token; please report this with the saved report."
    )
