"""Documents, CSV, pages and pictures of sweeps."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from memfabric.errors import UsageError
from memfabric.perf import charts, page, plots, svg
from memfabric.perf.messages import Ran
from memfabric.perf.results import csv_text, load, rates, save
from tests.perf_tool.conftest import noisy, point, record

Make = Callable[..., dict[str, Any]]


def some(document: Make) -> dict[str, Any]:
    points = [point(block_bytes=size, batch=batch) for size in (4096, 65536, 1 << 20) for batch in (1, 16)]
    records = [record(each, noisy(1e9 + each.block_bytes, 0.05, each.batch)) for each in points]
    records.append(record(point(op="match", nodes=1), noisy(5e5, 0.05, 3)))
    records.append(record(point(op="put", nodes=1, transport="<script>&"), [], problem='it "broke" <here>'))
    figure = {"tool": "ucx_perftest", "transport": "ucx", "op": "read", "block_bytes": 4096}
    tools = [{**figure, "bytes_per_s": 1.5e9, "reason": ""}, {**figure, "bytes_per_s": None, "reason": "not installed"}]
    return document(*records, tools=tools, skipped=[{"point": "read 1 GiB", "reason": "too large"}])


def test_rates_of_clients_add_up() -> None:
    one = Ran(ops=10, blocks=160, size_bytes=1000, busy_ns=10**9, counts=[(700, 10)], least_ns=5, most_ns=9)
    two = Ran(
        ops=30, blocks=480, size_bytes=3000, busy_ns=2 * 10**9, counts=[(700, 5), (710, 25)], least_ns=4, most_ns=8
    )
    found = rates([one, two])
    assert (found["ops"], found["bytes"]) == (40, 4000)
    assert (found["ops_per_s"], found["bytes_per_s"], found["blocks_per_s"]) == (25.0, 2500, 400.0)
    assert (found["latency"]["count"], found["latency"]["min_us"], found["latency"]["max_us"]) == (40, 0.004, 0.009)


def test_a_document_is_kept_and_read_back(document: Make, tmp_path: Path) -> None:
    made, path = some(document), tmp_path / "x.json"
    save(made, path)
    assert load(path) == json.loads(path.read_text())
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no results"),
        ("{", "no results"),
        ("[]", "no results"),
        ("null", "no results"),
        ('{"schema": "memfabric-bench/1"}', "memfabric-bench/1"),
        ('{"schema": "memfabric-perf/1", "machine": {}, "sweep": {}, "points": [{}]}', "no results"),
        ('{"schema": "memfabric-perf/1", "machine": {}, "sweep": {}, "points": 3}', "no results"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no results"):
        load(path)


def test_csv_has_a_line_for_each_point(document: Make) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(some(document)))))
    assert len(rows) == 8
    assert rows[0]["op"] == "read" and float(rows[0]["bytes_per_s"]) > 9e8 and float(rows[0]["ratio"]) > 0
    assert rows[6]["op"] == "match" and rows[6]["bytes_per_s"] == "" and float(rows[6]["blocks_per_s"]) > 4e5
    assert rows[7]["problem"] == 'it "broke" <here>' and rows[7]["p50_us"] == ""


@pytest.mark.parametrize(
    "harm",
    [
        lambda made: made["points"][0]["summary"].pop("bytes_per_s"),
        lambda made: made["points"][0]["summary"]["latency"].pop("p50_us"),
        lambda made: made["points"][0].update(batch="many"),
        lambda made: made["points"][0].pop("histogram"),
        lambda made: made["points"][0].update(repeats=[]),
        lambda made: made["points"][0]["repeats"][1].pop("bytes_per_s"),
        lambda made: made["machine"].pop("cpu"),
        lambda made: made["tools"][0].pop("tool"),
        lambda made: made.pop("skipped"),
        lambda made: made.update(stopped=3),
    ],
)
def test_a_document_that_lacks_something_is_refused(
    document: Make, tmp_path: Path, harm: Callable[[dict[str, Any]], Any]
) -> None:
    made, path = some(document), tmp_path / "x.json"
    harm(made)
    save(made, path)
    with pytest.raises(UsageError, match="no results"):
        load(path)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "line", "polyline", "circle", "rect"):
            self.open.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload"}, "a page needs nothing else"

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline", "circle", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_is_whole_and_needs_nothing_else(document: Make) -> None:
    read = _Page()
    read.feed(page.html(some(document)))
    assert read.open == []
    assert "script" not in read.tags and "link" not in read.tags
    assert read.tags.count("svg") == 2 * 2 + 7  # speed and time of two operations; a histogram for each point
    assert 'it "broke" <here>' in read.text and "<script>&" in read.text and "not installed" in read.text


def test_diagrams_are_xml_and_draw_every_line(document: Make) -> None:
    for pair in charts.panels(some(document)):
        for panel in pair:
            root = ElementTree.fromstring(svg.diagram(panel))
            assert len(root.findall("polyline")) == len(panel.lines) > 0
            for line in root.findall("polyline"):
                for number in line.attrib["points"].replace(",", " ").split():
                    assert -1 <= float(number) <= 700


def test_what_lines_show(document: Make) -> None:
    (speed, latency), (match, _) = charts.panels(some(document))
    assert speed.across == "block size" and [word for _, word in speed.ticks] == ["4 KiB", "64 KiB", "1 MiB"]
    assert [line.label for line in speed.lines] == ["x 1", "memcpy, x 1", "x 16", "memcpy, x 16"]
    assert all(
        low <= y <= high for line in speed.lines for low, y, high in zip(line.lows, line.ys, line.highs, strict=True)
    )
    assert [line.label for line in latency.lines] == ["x 1", "x 16"]
    assert match.up == "thousand keys/s" and match.lines[0].ys[0] == pytest.approx(500, rel=0.1)


def test_too_many_lines_are_counted(document: Make) -> None:
    points = [point(block_bytes=size, batch=batch) for size in range(1, 21) for batch in range(1, 13)]
    (speed, _), *_ = charts.panels(document(*(record(each, [1e9]) for each in points)))
    assert speed.left_out == 12 - charts.MOST_LINES
    assert "4 more in the table" in svg.diagram(speed)


def test_a_picture_is_drawn(document: Make) -> None:
    pytest.importorskip("matplotlib")
    assert plots.png(some(document)).startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="nothing was measured"):
        plots.png(document())


def test_without_matplotlib_a_picture_is_refused_and_a_page_is_not(
    document: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'memfabric\[plot\]'"):
        plots.check()
    assert "svg" in page.html(some(document))


def test_an_empty_document_is_shown_too(document: Make) -> None:
    assert "memfabric perf" in page.html(document())
    assert charts.panels(document()) == []
    assert csv_text(document()).count("\n") == 1
