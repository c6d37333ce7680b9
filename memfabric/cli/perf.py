"""``memfabric perf``: sweeps over a fabric, what two of them differ in, block sizes of common models."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from memfabric.cli.base import DURATION, SIZE, Settings, common_options, examples, pass_settings
from memfabric.cli.memory import DIRECTORY_VARIABLE, SHARED_MEMORY
from memfabric.cli.output import console, emit_json, note
from memfabric.errors import UsageError

if TYPE_CHECKING:
    from memfabric.perf.plan import Sweep
    from memfabric.perf.presets import Model
    from memfabric.perf.run import Progress

EXIT_INCOMPLETE = 1
EXIT_REGRESSION = 3
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group(
    short_help="Measure fabrics and pools, beside the limits of the machine.",
    epilog=examples(
        """
memfabric perf run
memfabric perf run --op get,put --transport shm,ucx --preset llama-3-8b --html sweep.html
memfabric perf compare old.json new.json --fail-on-regression
memfabric perf presets
"""
    ),
)
def perf() -> None:
    """Measure fabrics and pools, beside the limits of the machine."""


def _check_target(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a file that cannot be written before anything is measured."""
    if value is not None:
        parent = value.absolute().parent
        if not parent.is_dir():
            raise click.BadParameter(f"{parent} is not a directory", ctx, parameter)
        if not os.access(value if value.exists() else parent, os.W_OK):
            raise click.BadParameter(f"{value} cannot be written", ctx, parameter)
    return value


def _outputs(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--csv", "csv_file", type=_FILE, callback=_check_target, help="Write one line a point."),
        click.option("--plot", "plot_file", type=_FILE, callback=_check_target, help="Draw a PNG (needs matplotlib)."),
        click.option(
            "--html", "html_file", type=_FILE, callback=_check_target, help="Write a page that works offline."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--block-tokens", type=int, default=16, show_default=True, help="Tokens in a block."),
        click.option("--tp", type=int, default=1, show_default=True, help="Tensor-parallel ranks of a model."),
        click.option("--dtype", default="bf16", show_default=True, help="Type of its KV: fp8, bf16, fp16, fp32."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@perf.command(
    epilog=examples(
        """
memfabric perf run
memfabric perf run --op read --transport shm,ucx --block-size 4KiB:2MiB:x4 --batch 1,16,128
memfabric perf run --transport 'ucx:tls=tcp' --transport 'ucx:tls=tcp;lanes=2' --depth 1,4
memfabric perf run --op get,put,match --clients 1:4:+1 --preset llama-3-8b --out new.json
memfabric perf run --op get --pool tcp://10.0.0.1:7170 --total-time 2min
"""
    )
)
@click.option(
    "--op",
    "ops",
    default="read,write",
    show_default=True,
    help="read, write (a transport alone), get, put, match, reserve+commit (a pool); or all.",
)
@click.option(
    "-t",
    "--transport",
    "transports",
    multiple=True,
    help="NAME, NAME,NAME or [LABEL=]NAME:OPTION=VALUE;…; may be repeated.  [default: shm]",
)
@click.option("--kind", "kinds", default="cpu", show_default=True, help="Memory of the clients: cpu, cuda.")
@click.option(
    "-b", "--block-size", "block_sizes", help="Sizes: 64KiB,1MiB or 4KiB:2MiB:x4.  [default: 4KiB,64KiB,1MiB]"
)
@click.option("--preset", "presets", multiple=True, help="Block size of a model instead; may be repeated.")
@_model_options
@click.option("--batch", "batches", default="1,16,128", show_default=True, help="Blocks in one operation.")
@click.option("--depth", "depths", default="1", show_default=True, help="Operations in flight (read and write).")
@click.option("--threads", default="0", show_default=True, help="Native threads of an operation; 0: as many as pay.")
@click.option("--clients", default="1", show_default=True, help="Processes that do the same at the same time.")
@click.option("-n", "--nodes", default="1", show_default=True, help="Memory nodes of a pool.")
@click.option("--verify/--no-verify", default=None, help="Digests.  [default: in pools, not for read and write]")
@click.option(
    "--pool",
    help="Address of a pool that is there; a namespace of our own is made, and removed at the end.  "
    "[default: a pool of our own]",
)
@click.option("--repeats", type=int, default=5, show_default=True, help="Visits of each point.")
@click.option("--point-time", "point_ns", type=DURATION, default=10**9, help="For each point.  [default: 1s]")
@click.option("--total-time", "total_ns", type=DURATION, help="For everything; points get less if need be.")
@click.option("--working-set", type=SIZE, help="Each client takes blocks in turn from so much.  [default: 64MiB]")
@click.option("--memory", "memory_bytes", type=SIZE, help="All buffers together.  [default: half of what is free]")
@click.option("--random-order", is_flag=True, help="Take the blocks of a region in random order.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of keys, bytes, and the order of things.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    envvar=DIRECTORY_VARIABLE,
    default=SHARED_MEMORY,
    help=f"Shared memory.  [default: ${DIRECTORY_VARIABLE} or {SHARED_MEMORY}]",
)
@click.option("--no-tools", is_flag=True, help="Leave out ucx_perftest and ib_read_bw, ib_write_bw.")
@click.option("--dry-run", is_flag=True, help="Only say what would be measured, and how long it would take.")
@click.option("-o", "--out", "out_file", type=_FILE, callback=_check_target, help="Keep the results, as JSON.")
@_outputs
@click.option("-q", "--quiet", is_flag=True, help="No estimate and no progress.")
@common_options(json=True, server=False)
@pass_settings
def run(settings: Settings, **options: Any) -> None:
    """Measure every combination of what is given: lists (1,16) and ranges (4KiB:2MiB:x4, 1:8:+1).

    Beside each point the same bytes are copied by memcpy and sent through a plain socket, so that its speed can be told
    as a part of what is possible here. Ctrl-C ends a sweep early and keeps what was measured.
    """
    from memfabric.cli.perf_render import plan_text, show_sweep
    from memfabric.perf import plots, results
    from memfabric.perf.plan import make_plan
    from memfabric.perf.run import run_sweep

    if options["plot_file"] is not None:
        plots.check()
    plan = make_plan(_sweep(options))
    if options["dry_run"]:
        click.echo(plan_text(plan))
        for points in plan.points.values():
            for point in points:
                click.echo(f"  {point}")
        return
    if not options["quiet"]:
        note(plan_text(plan))
    with _progress(options["quiet"]) as tell, _stoppable():
        document = run_sweep(plan, tell, with_tools=not options["no_tools"])
    with ExitStack() as last:  # what can't be written keeps nothing else from being written or shown
        last.callback(_write, document, options)
        if settings.as_json:
            last.callback(emit_json, document)
        else:
            last.callback(show_sweep, console(), document)
        if options["out_file"] is not None:
            last.callback(results.save, document, options["out_file"])
    if document["stopped"] == "interrupted":
        raise click.exceptions.Exit(128 + signal.SIGINT)
    if document["stopped"] or any(record.get("problem") for record in document["points"]):
        raise click.exceptions.Exit(EXIT_INCOMPLETE)


@perf.command(epilog=examples("memfabric perf show new.json\nmemfabric perf show new.json --html new.html"))
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_outputs
@common_options(json=True, server=False)
@pass_settings
def show(settings: Settings, file: Path, **options: Any) -> None:
    """Show the results of a sweep once more."""
    from memfabric.cli.perf_render import show_sweep
    from memfabric.perf import results

    document = results.load(file)
    if settings.as_json:
        emit_json(document)
    else:
        show_sweep(console(), document)
    _write(document, options)


@perf.command(
    epilog=examples(
        """
memfabric perf compare old.json new.json
memfabric perf compare old.json new.json --metric p99 --effect 10
memfabric perf compare old.json new.json --fail-on-regression
"""
    )
)
@click.argument("old", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--metric",
    type=click.Choice(["throughput", "ratio", "p50", "p99"]),
    default="throughput",
    show_default=True,
    help="What to compare; ratio: to the limit beside the point.",
)
@click.option("--effect", type=float, default=5.0, show_default=True, help="Least change that matters, in per cent.")
@click.option("--alpha", type=float, default=0.01, show_default=True, help="How often the bounds of a point may miss.")
@click.option("--fail-on-regression", is_flag=True, help=f"Exit with {EXIT_REGRESSION} if a point is slower.")
@common_options(json=True, server=False)
@pass_settings
def compare(
    settings: Settings, old: Path, new: Path, metric: str, effect: float, alpha: float, fail_on_regression: bool
) -> None:
    """Tell which points of two sweeps differ, and for which that cannot be told.

    A point is called faster or slower only if its repeats show it and the change is large enough to matter; where they
    scatter too much to see such a change it is called too noisy.
    """
    from memfabric.cli.perf_render import show_comparison
    from memfabric.perf import results
    from memfabric.perf.compare import SLOWER
    from memfabric.perf.compare import compare as compare_documents

    found = compare_documents(results.load(old), results.load(new), metric, effect / 100, alpha)
    if settings.as_json:
        emit_json(found.document())
    else:
        show_comparison(console(), found)
    if fail_on_regression and found.count(SLOWER):
        raise click.exceptions.Exit(EXIT_REGRESSION)


@perf.command(
    epilog=examples(
        """
memfabric perf presets
memfabric perf presets llama-3-70b deepseek-v3 --tp 8 --dtype fp8 --block-tokens 64
"""
    )
)
@click.argument("models", nargs=-1)
@_model_options
@common_options(json=True, server=False)
@pass_settings
def presets(settings: Settings, models: tuple[str, ...], block_tokens: int, tp: int, dtype: str) -> None:
    """Show how many bytes of KV a token and a block of common models take, and why.

    Formula: 2 x layers x KV heads x head dimension x bytes of the type; with multi-head latent attention layers x
    (kv_lora_rank + qk_rope_head_dim) x bytes of the type. Source: the models' published config.json.
    """
    from memfabric.cli.perf_render import show_presets
    from memfabric.perf.presets import DTYPE_BYTES, MODELS, find

    chosen = [find(name) for name in models] or list(MODELS)
    if dtype not in DTYPE_BYTES:
        raise UsageError(f"unknown type {dtype!r} of KV; known: {', '.join(DTYPE_BYTES)}")
    for name in models:
        find(name).block_bytes(block_tokens, tp=tp, dtype=dtype)  # what is asked for by name must be possible
    if settings.as_json:
        emit_json([_preset(model, block_tokens, tp, dtype) for model in chosen])
    else:
        show_presets(console(), chosen, block_tokens=block_tokens, tp=tp, dtype=dtype)


def _preset(model: Model, block_tokens: int, tp: int, dtype: str) -> dict[str, Any]:
    import dataclasses

    found = {**dataclasses.asdict(model), "formula": model.formula, "tp": tp, "dtype": dtype}
    found["block_tokens"] = block_tokens
    try:
        found["token_bytes"] = model.token_bytes(tp=tp, dtype=dtype)
        found["block_bytes"] = model.block_bytes(block_tokens, tp=tp, dtype=dtype)
    except UsageError as error:
        found |= {"token_bytes": None, "block_bytes": None, "problem": str(error)}
    return found


def _sweep(options: dict[str, Any]) -> Sweep:
    from memfabric.perf import axes
    from memfabric.perf.plan import OPS, Sweep
    from memfabric.perf.presets import find

    if options["block_sizes"] is not None and options["presets"]:
        raise UsageError("--block-size and --preset exclude each other")
    given: dict[str, Any] = {}
    if options["presets"]:
        shape = {"tp": options["tp"], "dtype": options["dtype"]}
        sizes = [find(name).block_bytes(options["block_tokens"], **shape) for name in options["presets"]]
        given["block_bytes"] = tuple(dict.fromkeys(sizes))
    elif options["block_sizes"] is not None:
        given["block_bytes"] = tuple(axes.sizes(options["block_sizes"]))
    names = [
        part for text in options["transports"] or ("shm",) for part in ([text] if ":" in text else text.split(","))
    ]
    for name in ("batches", "depths", "threads", "clients", "nodes"):
        given[name] = tuple(axes.counts(options[name], name.removesuffix("es") if name == "batches" else name))
    if options["working_set"] is not None:
        given["working_set_bytes"] = options["working_set"]
    return Sweep(
        ops=OPS if options["ops"].strip() == "all" else _words(options["ops"]),
        fabrics=tuple(axes.fabric(name) for name in names),
        kinds=_words(options["kinds"]),
        verify=options["verify"],
        repeats=options["repeats"],
        point_s=options["point_ns"] / 1e9,
        total_s=None if options["total_ns"] is None else options["total_ns"] / 1e9,
        memory_bytes=options["memory_bytes"],
        random_order=options["random_order"],
        seed=options["seed"],
        directory=options["directory"],
        address=None if options["pool"] is None else Settings(address=options["pool"]).server,
        **given,
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _write(document: dict[str, Any], options: dict[str, Any]) -> None:
    from memfabric.perf import page, plots, results

    if options["csv_file"] is not None:
        results.write_whole(options["csv_file"], results.csv_text(document).encode())
    if options["html_file"] is not None:
        results.write_whole(options["html_file"], page.html(document).encode())
    if options["plot_file"] is not None:
        results.write_whole(options["plot_file"], plots.png(document))


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None)

        def tell(progress: Progress) -> None:
            bar.update(
                task, completed=progress.done, total=progress.total, description=progress.what.replace("[", r"\[")
            )

        yield tell


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP end a sweep as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
