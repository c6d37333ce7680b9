"""The course of the demonstration: model, pool, prefill, decode, the same without the pool, verdict.

Responsible for the order of things. Every process that computes is a worker (`worker`); what they tell is put
together here, compared, drawn and shown.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from memfabric.demo import messages, prompts, screen
from memfabric.demo.children import HOSTS_TRANSPORT, run_pool, run_worker
from memfabric.demo.model import MODEL, cache_directory, ready_model
from memfabric.demo.report import DemoError, DemoOptions, DemoReport, PrefillReport, RequestReport
from memfabric.errors import UsageError
from memfabric.testing.hosts import Host, Hosts

NAMESPACE = "demo-smollm2-135m"
REPORT_NAME = "report.json"
PLOT_NAME = "demo.png"
_NEEDED = ("torch", "transformers", "gguf", "accelerate", "safetensors", "matplotlib")
_PREFILL, *_ = prompts.TITLES


def run_demo(options: DemoOptions) -> DemoReport:
    """Run the whole demonstration; prints progress to standard error and the table (or JSON) to standard output.

    The plot and the report are in ``options.out_dir`` afterwards, also when the tokens differ. Blocks for a
    minute or two. On Ctrl-C or SIGTERM everything that was started is ended first.

    Raises:
        UsageError: an option is wrong, or the ``demo`` extra is not installed. DemoError: a part failed.
        TokensDifferError: reuse changed a token. KeyboardInterrupt: it was asked to stop.
    """
    options.check()
    _check_extra()
    progress = screen.Progress(quiet=options.quiet)
    start_s = time.monotonic()
    with _ended_by_sigterm():
        options.out_dir.mkdir(parents=True, exist_ok=True)
        model_dir = _prepare(options, progress)
        setup_s = time.monotonic() - start_s
        parts = _Parts(options, model_dir, progress)
        parts.run()
    report = parts.report(setup_s, start_s)
    _save(report, options.out_dir)
    if options.as_json:
        sys.stdout.write(json.dumps(report.document(), indent=2) + "\n")
    else:
        screen.show(report)
    report.check()
    return report


class _Parts:
    """The processes of one demonstration and what they told."""

    def __init__(self, options: DemoOptions, model_dir: Path, progress: screen.Progress) -> None:
        self._options = options
        self._model_dir = model_dir
        self._progress = progress
        self._pids: dict[str, int] = {}
        self._served: dict[str, list[messages.Served]] = {}
        self._loaded: messages.Loaded | None = None

    def run(self) -> None:
        """Prefill, decode with the pool, and both requests without it."""
        options, names = self._options, list(prompts.TITLES)
        nodes = f"{options.node_count} memory node{'s' if options.node_count != 1 else ''}"
        with contextlib.ExitStack() as stack:
            here = there = None
            if options.hosts:
                here, there = stack.enter_context(Hosts(2)).hosts
            with self._progress.step(f"Starting a metadata server and {nodes}"):
                pool = stack.enter_context(run_pool(options, here))
            self._pids.update(pool.pids)
            self._serve("prefill", [_PREFILL], pool.address, repeats=1, host=here)
            pool.check()
            self._serve("decode", names, pool.address, host=there)
            pool.check()
        self._serve("cold", names, "")

    def report(self, setup_s: float, start_s: float) -> DemoReport:
        """Put together what the processes told."""
        assert self._loaded is not None, "run() was not called"
        prefill = self._served["prefill"][0]
        pairs = zip(self._served["decode"], self._served["cold"], strict=True)
        return DemoReport(
            model=MODEL,
            revision=self._loaded.revision,
            dtype=self._loaded.dtype,
            attention=self._loaded.attention,
            block_tokens=self._options.block_tokens,
            block_bytes=self._loaded.block_bytes,
            nodes=self._options.node_count,
            hosts=2 if self._options.hosts else 1,
            transport=self._served["decode"][0].transport,
            prefill=PrefillReport(
                name=prefill.name,
                title=prompts.TITLES[prefill.name],
                prompt_tokens=prefill.prompt_tokens,
                blocks_written=prefill.blocks_written,
                bytes_written=prefill.bytes_written,
                compute_s=prefill.first_token_s[-1],
                put_s=prefill.store_s,
            ),
            requests=[_compare(pool, cold) for pool, cold in pairs],
            pids=self._pids,
            versions=self._loaded.versions,
            plot=str(self._options.out_dir / PLOT_NAME),
            setup_s=setup_s,
            elapsed_s=time.monotonic() - start_s,
        )

    def _serve(
        self, role: str, names: list[str], address: str, repeats: int | None = None, host: Host | None = None
    ) -> None:
        job = messages.Serve(
            model_dir=str(self._model_dir),
            prompts=names,
            new_tokens=1 if role == "prefill" else self._options.new_tokens,
            repeats=repeats or self._options.repeats,
            block_tokens=self._options.block_tokens,
            address=address,
            namespace=NAMESPACE if address else "",
            shm_directory=str(self._options.shm_directory or ""),
            transport=HOSTS_TRANSPORT if host is not None else "auto",
        )
        with self._progress.step(_STEPS[role]) as doing:

            def on_event(event: messages.Event) -> None:
                if isinstance(event, messages.Status):
                    doing(event.text)

            pid, events = run_worker(f"the {role} process", job, self._options.step_timeout_s, on_event, host)
        self._pids[role] = pid
        self._served[role] = [event for event in events if isinstance(event, messages.Served)]
        self._loaded = next(event for event in events if isinstance(event, messages.Loaded))
        for served in self._served[role]:
            if served.problem:
                self._progress.note(f"  {role} of {served.name!r} could not store everything: {served.problem}")
            if role == "prefill" and not served.blocks_written:
                raise DemoError(f"the prefill process wrote no block into the pool. {served.problem}")


_STEPS = {
    "prefill": "Prefill process: computes the prompt, writes its KV blocks",
    "decode": "Decode process: reads KV blocks, computes the rest, generates",
    "cold": "The same requests without the pool, for comparison",
}


def _compare(pool: messages.Served, cold: messages.Served) -> RequestReport:
    return RequestReport(
        name=pool.name,
        title=prompts.TITLES[pool.name],
        prompt_tokens=pool.prompt_tokens,
        reused_tokens=pool.reused_tokens,
        blocks_read=pool.blocks_read,
        bytes_read=pool.bytes_read,
        blocks_written=pool.blocks_written,
        bytes_written=pool.bytes_written,
        ttft_pool_s=pool.first_token_s,
        ttft_cold_s=cold.first_token_s,
        load_s=pool.load_s,
        tokens_pool=pool.tokens,
        tokens_cold=cold.tokens,
        text=pool.text,
    )


def _prepare(options: DemoOptions, progress: screen.Progress) -> Path:
    """The converted model; made by a process of its own, for its memory."""
    cache = cache_directory(options.cache_dir)
    found = ready_model(cache)
    if found is not None:
        return found
    with progress.step(f"Getting the model ready in {cache}") as doing:

        def on_event(event: messages.Event) -> None:
            if isinstance(event, messages.Status):
                doing(event.text)

        job = messages.Convert(cache=str(cache))
        _, events = run_worker("the conversion", job, options.step_timeout_s, on_event)
    return Path(next(event.model_dir for event in events if isinstance(event, messages.Converted)))


def _save(report: DemoReport, out_dir: Path) -> None:
    from memfabric.demo import plot

    plot.draw(report, out_dir / PLOT_NAME)
    (out_dir / REPORT_NAME).write_text(json.dumps(report.document(), indent=2) + "\n")


def _check_extra() -> None:
    """Before anything starts: is everything there that the workers import?

    Raises:
        UsageError: names what is missing and what to install.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the demo needs {', '.join(missing)}, not installed here; install the extra: pip install 'memfabric[demo]'"
        )


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make SIGTERM unwind the stack like Ctrl-C, so that what was started is ended. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
