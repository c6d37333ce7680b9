"""The verdict: what counts as identical, and what the demonstration says when it is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from memfabric.demo import DemoError, DemoOptions, DemoReport, RequestReport, TokensDifferError, prompts
from memfabric.demo.report import PrefillReport, first_difference
from memfabric.errors import UsageError


def request(name: str = "customer", **changes: object) -> RequestReport:
    found = RequestReport(
        name=name,
        title="a request",
        prompt_tokens=100,
        reused_tokens=96,
        blocks_read=6,
        bytes_read=600,
        blocks_written=0,
        bytes_written=0,
        ttft_pool_s=[0.5, 0.1, 0.2],
        ttft_cold_s=[2.0, 1.0, 3.0],
        load_s=[0.1, 0.1, 0.1],
        tokens_pool=[7, 8, 9],
        tokens_cold=[7, 8, 9],
        text="words",
    )
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def report(*requests: RequestReport, blocks_written: int = 6) -> DemoReport:
    return DemoReport(
        model="m",
        revision="r",
        dtype="float32",
        attention="sdpa",
        block_tokens=16,
        block_bytes=100,
        nodes=2,
        hosts=1,
        transport="shm",
        prefill=PrefillReport("customer", "a request", 100, blocks_written, 100 * blocks_written, 2.0, 0.1),
        requests=list(requests),
        pids={"prefill": 1, "decode": 2, "cold": 3},
        versions={},
        plot="demo.png",
        setup_s=0.0,
        elapsed_s=1.0,
    )


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([], [], None),
        ([1, 2], [1, 2], None),
        ([1, 2], [1, 3], 1),
        ([5], [6], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1], 1),
        ([], [1], 0),
    ],
)
def test_first_difference(left: list[int], right: list[int], expected: int | None) -> None:
    assert first_difference(left, right) == expected


def test_medians_decide() -> None:
    found = request()
    assert (found.pool_s, found.cold_s, found.speedup_ratio) == (0.2, 2.0, 10.0)


def test_a_good_report_passes_and_is_json() -> None:
    good = report(request(), request("colleague"))
    good.check()
    document = json.loads(json.dumps(good.document()))
    assert document["identical"] is True
    assert document["requests"][0]["speedup_ratio"] == 10.0


def test_a_changed_token_fails_loudly_with_its_position() -> None:
    bad = report(request(), request("colleague", tokens_pool=[7, 8, 10]))
    with pytest.raises(TokensDifferError, match=r"'colleague', new token 2 \(counted from 0\)") as caught:
        bad.check()
    assert caught.value.report is bad
    assert "8 10" in str(caught.value)
    assert "8 9" in str(caught.value)
    assert bad.document()["requests"][1]["first_difference"] == 2


def test_tokens_that_end_early_fail_too() -> None:
    with pytest.raises(TokensDifferError, match=r"new token 2.*\n.*\(ends\)"):
        report(request(tokens_pool=[7, 8])).check()


def test_a_run_that_shows_nothing_fails() -> None:
    with pytest.raises(DemoError, match="wrote no block"):
        report(request(), blocks_written=0).check()
    with pytest.raises(DemoError, match="read no block"):
        report(request(blocks_read=0)).check()


@pytest.mark.parametrize("name", ["new_tokens", "block_tokens", "repeats", "node_count"])
@pytest.mark.parametrize("value", [0, -1, 10_000])
def test_options_out_of_range_are_refused(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=name):
        dataclasses.replace(DemoOptions(), **{name: value}).check()


def test_requests_share_a_long_system_prompt_and_differ() -> None:
    texts = [prompts.conversation(name) for name in prompts.TITLES]
    assert len(texts) >= 2
    assert len({turns[0]["content"] for turns in texts}) == 1
    assert len(texts[0][0]["content"].split()) > 800
    assert len({turns[1]["content"] for turns in texts}) == len(texts)


def test_the_table_and_the_plot_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib: pip install 'memfabric[demo]'")
    from memfabric.demo import plot, screen

    found = report(request(), request("colleague", tokens_pool=[1]))
    screen.show(found)
    shown = capsys.readouterr().out
    assert "yes (3 of 3)" in shown
    assert "NO (from 0 on)" in shown
    plot.draw(found, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
