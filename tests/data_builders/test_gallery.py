"""The gallery page needs nothing else, and escapes what data say."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from data_builders.gallery import REJECTED, duration, render_gallery
from data_builders.samples import Candidate
from data_builders.stages.assemble import AssembleOptions, write_set
from tests.data_builders.finished_samples import MANIFEST, build_of, finished, pictures_in
from tests.report.browser import looks_right

VOID = {"meta", "img", "br", "link"}


class Balanced(HTMLParser):
    """Notes tags that are closed in another order than they were opened."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture
def pictures(tmp_path):
    return pictures_in(tmp_path)


def page_of(samples, pictures, folder, count=10):
    options = AssembleOptions()
    found = write_set(samples, options, pictures, folder)
    return render_gallery(build_of(pictures, folder, options), found, count, "name: x", MANIFEST)


def test_every_record_is_shown_with_what_belongs_to_it(pictures, tmp_path):
    samples = finished(pictures)
    page = page_of(samples, pictures, tmp_path)
    assert page.count('<article class="record">') == 6
    for sample in samples:
        for text in (sample.question, sample.rephrase, sample.target, sample.id,
                     sample.text_locality.question, sample.text_locality.answer):  # fmt: skip
            assert text in page
    assert page.count('<img src="data:image/jpeg;base64,') == 6 * 4
    assert page.count("too alike") == 2 * 6  # the text, and the text for who does not see it
    assert "CLIP: text 0.31" in page
    assert "answered rightly" in page
    checked = Balanced()
    checked.feed(page)
    assert (checked.open, checked.wrong) == ([], [])


def test_it_needs_no_other_file(pictures, tmp_path):
    page = page_of(finished(pictures), pictures, tmp_path)
    assert "<script" not in page
    assert all(src.startswith("data:") for src in re.findall(r'src="([^"]*)"', page))
    assert not re.findall(r'href="|url\(', page)


def test_it_looks_right_in_a_browser(pictures, tmp_path):
    """With defects, a long word, a candidate without a picture, and more records than are shown."""
    samples = finished(pictures, 12, 4)
    gone = [Candidate(f"made:gone/{n}.png", "", "x", reason="z" * 60) for n in range(3)]
    samples[0] = samples[0].with_(candidates=(samples[0].candidates[0], *gone))
    samples[-1] = samples[-1].with_(image_locality=samples[0].image_locality)
    samples[1] = samples[1].with_(question="Donaudampfschifffahrt" * 12 + "?")
    page = tmp_path / "gallery.html"
    page.write_text(page_of(samples, pictures, tmp_path / "set", 9), encoding="utf-8")
    assert '<section class="warning">' in page.read_text(encoding="utf-8")
    looks_right(page, tmp_path)


def test_records_are_drawn_by_the_seed(pictures, tmp_path):
    samples = finished(pictures, 40, 10)
    one, two = (page_of(samples, pictures, tmp_path / name, 5) for name in "ab")
    assert one == two
    shown = re.findall(r"· (?:train|eval), (q\d+)<", one)
    assert len(shown) == 5
    assert shown == sorted(shown, key=lambda name: int(name[1:]))
    assert "5 of 40, drawn at random" in one


def test_texts_of_data_are_escaped(pictures, tmp_path):
    samples = finished(pictures)
    samples[0] = samples[0].with_(question="<script>alert(1)</script>?", target='"><img src=x>')
    page = page_of(samples, pictures, tmp_path)
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_defects_are_named_on_the_page(pictures, tmp_path):
    samples = finished(pictures)
    samples[5] = samples[5].with_(image_locality=samples[0].image_locality)
    page = page_of(samples, pictures, tmp_path)
    assert "eval, record 1 (q5): image in two splits" in page
    assert 'class="bad">3 defects' in page
    assert 'class="good">0 defects' in page_of(finished(pictures), pictures, tmp_path)


def test_a_candidate_whose_picture_is_gone_is_still_told(pictures, tmp_path):
    samples = finished(pictures, 2, 0)
    gone = [Candidate(f"made:gone/{n}.png", "", "x", reason=f"reason {n}") for n in range(9)]
    samples[0] = samples[0].with_(candidates=(samples[0].candidates[0], *gone))
    page = page_of(samples, pictures, tmp_path)
    assert page.count("<figcaption>reason ") == REJECTED
    assert f"{9 - REJECTED} more are not shown" in page


def test_a_caption_of_500_words_is_cut(pictures, tmp_path):
    samples = finished(pictures, 1, 0)
    page = page_of([samples[0].with_(captions=("word " * 500,))], pictures, tmp_path)
    assert 0 < page.count("word") < 100
    assert "word…" in page


def test_an_empty_set_has_a_page(pictures, tmp_path):
    assert "all 0" in page_of([], pictures, tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (12.4, "12 s"), (200, "3 min 20 s"), (7260, "2 h 1 min")],
)
def test_durations_are_said_as_people_do(seconds, text):
    assert duration(seconds) == text
