"""Reports: self-contained, escaped, bounded in size, with the numbers that the run found."""

from __future__ import annotations

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from mmtune.report import Report, write_report
from mmtune.report.markdown import render_markdown
from mmtune.report.numbers import duration, rows, share, size
from mmtune.report.pictures import Pictures
from mmtune.report.plots import curve, training_curves
from mmtune.runs import Results
from mmtune.tasks.base import GalleryItem, Metric, Shown
from tests.report.browser import looks_right


def picture(mode="RGB", edge=300):
    noise = np.random.default_rng(0).integers(0, 255, (edge, edge, 4), dtype=np.uint8)
    return Image.fromarray(noise, "RGBA").convert(mode)


def results(low=2.0, high=9.0):
    return Results(
        before={"R@1": Metric(20.0, 15.0, 25.0, 100), "R@5": Metric(40.0, 35.0, 45.0, 100)},
        after={"R@1": Metric(25.5, 20.0, 31.0, 100), "R@5": Metric(40.0, 35.0, 45.0, 100)},
        difference={"R@1": Metric(5.5, low, high, 100), "R@5": Metric(0.0, -2.0, 2.0, 100)},
        trainable=1234,
        total=1_000_000,
        seconds=61.2,
        peak_memory=3 * 2**29,
        memory_kind="process RSS",
        steps=40,
    )


def report(**changes):
    nasty = "<script>alert(1)</script>"
    item = GalleryItem(
        title="rank 7 → 1",
        query=Shown(text=nasty),
        before=[Shown(picture(), "wrong one", False)],
        after=[Shown(picture("RGBA"), "right one", True), Shown(picture("L"), "no matter")],
    )
    fields = {
        "title": "trial",
        "summary": nasty,
        "results": results(),
        "primary": "R@1",
        "log": [{"step": s, "loss": 1 / s, "learning_rate": 1e-3 / s} for s in range(1, 9)],
        "gallery": [item],
        "config": "name: trial\n# " + nasty,
        "manifest": {
            "seed": 3,
            "versions": {"torch": "2"},
            "data": {"a.parquet": {"sha256": "abc", "bytes": 5}},
        },
        **changes,
    }
    return Report(**fields)


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "path", "use", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path):
    return write_report(report(), tmp_path).read_text(encoding="utf-8")


def test_page_needs_nothing_else_and_runs_nothing(page):
    parsed = Page(page)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in parsed.links)
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page


def test_the_page_looks_right_in_a_browser(tmp_path):
    looks_right(write_report(report(), tmp_path), tmp_path)


def test_texts_of_the_data_are_escaped(page):
    assert "<script>" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3


def test_page_shows_numbers_frames_and_both_colour_schemes(page):
    for text in (
        "25.5 [20.0, 31.0]",
        "+5.5",
        "[+2.0, +9.0]",
        "<b>1,234</b>",
        "of 1,000,000",
        "0.12 %",
    ):
        assert text in page, text
    assert "<b>1 min 01 s</b>" in page
    assert "40 steps" in page
    assert "<b>1.50 GiB</b>" in page
    assert "process RSS" in page
    assert page.count('class="cell wrong"') == 1
    assert page.count('class="cell right"') == 1
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


def test_report_without_log_gallery_or_primary_metric_is_whole(tmp_path):
    bare = report(log=[], gallery=[], primary="mean", manifest={})
    text = write_report(bare, tmp_path).read_text(encoding="utf-8")
    assert Page(text).open == []
    assert "<svg" not in text
    assert "Queries whose" not in text


def test_differences_are_coloured_only_where_clear_of_zero():
    assert [r.sign for r in rows(results())] == [1, 0]
    assert [r.sign for r in rows(results(low=-9.0, high=-1.0))] == [-1, 0]
    assert [r.sign for r in rows(results(low=-1.0))] == [0, 0]


def test_a_lower_median_rank_is_better():
    rank = Metric(-8.0, -12.0, -4.0, 100)
    both = {"R@1": rank, "txt2img MdR": rank}
    assert [r.sign for r in rows(Results(both, both, both, 1, 2, 0, 0, "", 0))] == [-1, 1]


def test_markdown_has_the_same_table():
    text = render_markdown(report())
    assert "| R@1 | 20.0 [15.0, 25.0] | 25.5 [20.0, 31.0] | +5.5 [+2.0, +9.0] |" in text
    assert "- data a.parquet sha256: abc" in text


def test_pictures_are_small_and_stop_at_the_budget():
    pictures = Pictures(edge=64, budget=2500)
    first = pictures.uri(picture())
    assert first.startswith("data:image/jpeg;base64,")
    assert len(first) < 2500
    assert pictures.uri(picture()) == ""
    assert pictures.left_out == 1


def test_transparent_pixels_become_white():
    import base64
    import io

    uri = Pictures().uri(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert image.getpixel((4, 4)) == (255, 255, 255)


def test_curve_scales_and_takes_the_colours_of_the_page():
    svg = curve("a < b", [1, 2, 3], [3.0, 2.0, 1.0])
    head = svg[: svg.index(">")]
    assert " width=" not in head
    assert "viewBox" in head
    assert 'aria-label="a &lt; b"' in head
    assert "currentColor" in svg
    assert "var(--accent)" in svg
    assert "<metadata" not in svg
    assert svg == curve("a < b", [1, 2, 3], [3.0, 2.0, 1.0])


def test_curves_of_validation_metrics_are_drawn_too():
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_R@1": 30.0}]
    assert [re.search(r'aria-label="([^"]*)"', s)[1] for s in training_curves(log)] == [
        "training loss",
        "validation R@1",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (12, "12 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_sizes_and_small_shares():
    assert [size(n) for n in (5, 2048, 5 * 2**20, 2**31)] == ["5 B", "2 KiB", "5 MiB", "2.00 GiB"]
    small = Results({}, {}, {}, 40, 1_000_000, 0, 0, "", 0)
    assert share(small) == "0.004 %"


def test_a_film_strip_is_a_row_of_its_own_and_stays_sharp():
    strip = Image.new("RGB", (649, 120), "red")
    pictures = Pictures()
    data = base64.b64decode(pictures.uri(strip).partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (480, 89)
    data = base64.b64decode(pictures.uri(strip.crop((0, 0, 200, 120))).partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (160, 96)
