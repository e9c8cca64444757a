"""The page in a real browser: found pictures, edits and their undoing, messages, other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmtune import zoo
from mmtune.data.images import load_image
from mmtune.ui.editing import drawings
from tests.report.browser import BROWSER
from tests.tasks.tiny import tiny_loaded
from tests.ui.adapters import random_adapter
from tests.ui.page_process import WRITER

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
if BROWSER is None:
    pytest.skip("no Chromium here", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
WAIT = 60_000  # milliseconds; a browser and a server may share one core with other tests
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
NAMES = ("a", "b", "c", "d", "e", "f")
# Texts, values and placeholders with less contrast than WCAG's 4.5 : 1, disabled buttons left out.
UNREADABLE = """() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const rgba = (text) => [numbers(text).slice(0, 3), numbers(text)[3] ?? 1];
  const over = ([front, alpha], back) => back.map((x, i) => x * (1 - alpha) + front[i] * alpha);
  const light = (colour) => colour.map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const parents = (e) => (e ? [e, ...parents(e.parentElement)] : []);
  const found = [];
  const check = (e, text, pseudo) => {
    const all = parents(e), back = all.map((p) => rgba(getComputedStyle(p).backgroundColor))
      .reduceRight((under, layer) => over(layer, under), [255, 255, 255]);
    const [front, alpha] = rgba(getComputedStyle(e, pseudo).color);
    const opacity = all.reduce((product, p) => product * getComputedStyle(p).opacity, alpha);
    const [a, b] = [light(over([front, opacity], back)), light(back)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)}: ${text.trim().slice(0, 60)}`);
  };
  for (const e of document.querySelectorAll("body *")) {
    if (!e.checkVisibility() || e.closest(":disabled")) continue;
    const own = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join("");
    if (own.trim()) check(e, own);
    if (e.value && !e.matches("[type=radio], [type=range]")) check(e, e.value);
    if (e.placeholder) check(e, e.placeholder, "::placeholder");
  }
  return found;
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("ui")
    (root / "images").mkdir()
    for name, image in zip(NAMES, drawings(), strict=False):
        load_image(image).save(root / "images" / f"{name}.png")
    (root / "images" / "broken.png").write_bytes(b"no image")
    random_adapter(zoo.load("tiny-clip"), root / "adapter")
    random_adapter(tiny_loaded(), root / "other", ("q",))
    return root


def started(folder, log, *arguments):
    """`mmtune ui` as a process of its own, and the address that it prints."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HTTP_PROXY": "http://127.0.0.1:9",  # nobody answers there: the page needs nobody
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "GRADIO_SHARE": "True",
        "GRADIO_TEMP_DIR": str(folder / "shown"),
    }
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.ui.page_process", "ui", "--port", "0", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    line = process.stdout.readline()
    found = re.match(r"page: (http://127\.0\.0\.1:\d+/) ", line)
    if found is None:
        process.kill()
        pytest.fail(f"no page: {line}{log.read_text()}")
    return process, found[1]


@pytest.fixture(scope="module")
def address(folder):
    process, url = started(
        folder, folder / "log.txt", "--model", "zoo:tiny-clip",
        "--adapter", str(folder / "adapter"),
        "--images", str(folder / "images"), "--mllm", WRITER,
    )  # fmt: skip
    yield url
    process.terminate()
    process.wait(30)
    assert "Traceback" not in (folder / "log.txt").read_text()


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, address):
    """The page, opened; nothing that it loads may be elsewhere, and nothing may fail in it."""
    asked, wrong = [], []
    with browser.new_context(viewport=DESK) as context:
        opened = context.new_page()
        opened.set_default_timeout(WAIT)
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.goto(address)
        opened.get_by_text("Features of 6 pictures are computed").wait_for()
        yield opened
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not elsewhere
    assert not wrong


def fits(page, shot):
    """Assert that nothing is wider than the window, on a desk and on a phone; takes pictures."""
    for name, size in (("desk", DESK), ("phone", PHONE)):
        page.set_viewport_size(size)
        page.wait_for_timeout(300)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= size["width"], f"{wide} pixels on a {name}"
        file = shot.with_name(f"{shot.name}-{name}.png")
        page.screenshot(path=file, full_page=True)
        with Image.open(file) as picture:
            assert len(picture.convert("RGB").resize((64, 64)).getcolors(64 * 64)) > 8
    page.set_viewport_size(DESK)


def found(page, side):
    """The captions of the pictures found by a model, all of which have loaded."""
    page.wait_for_function(
        f"(n => n.length && n.every(i => i.naturalWidth > 0))"
        f"([...document.querySelectorAll('#side-{side} img')])"
    )
    return page.locator(f"#side-{side} img").evaluate_all("all => all.map(i => i.alt)")


def test_a_query_shows_two_columns_of_pictures(page, folder):
    page.fill("#query textarea", "a yellow lion")
    page.press("#query textarea", "Enter")
    base, adapted = found(page, 0), found(page, 1)
    assert sorted(base) == sorted(adapted) == [f"{name}.png" for name in NAMES]
    assert page.get_by_text("With adapter: lora").is_visible()
    left, right = (page.locator(f"#side-{side} img").first.bounding_box() for side in (0, 1))
    assert left["x"] + left["width"] <= right["x"]
    assert left["y"] == right["y"]
    scores = page.locator("#side-1 figcaption").all_inner_texts()
    assert all(re.match(r"\d -?[01]\.\d{3}", text) for text in scores)
    fits(page, folder / "search")


def test_what_is_wrong_with_a_query_is_said_in_the_page(page):
    page.get_by_text("1 could not be used: 1 not an image").wait_for()
    page.click("#search")
    page.get_by_text("Type what to look for").wait_for()
    assert page.locator("#side-0 img").count() == 0
    page.fill("#query textarea", "bird " * 200)
    page.click("#search")
    page.get_by_text("202 tokens and the model reads 32").wait_for()
    assert len(found(page, 0)) == len(NAMES)


def cells(page):
    """The rows of the table of answers."""
    rows = page.locator("table.answers tr").all()
    return [row.locator("th, td").all_inner_texts() for row in rows]


def test_an_edit_is_made_and_undone(page, folder):
    page.get_by_role("tab", name="Edit").click()
    page.click("#edit")
    page.get_by_text("Choose a picture, or upload one").wait_for()
    page.set_input_files("#picture input[type=file]", folder / "images" / "a.png")
    page.locator("#picture img").wait_for()
    page.locator("#other-examples button").nth(3).click()
    page.locator("#other img").wait_for()
    page.click("#edit")
    page.get_by_text("Type the new answer").wait_for()
    page.fill("#question textarea", "w5 w9 w7")
    page.fill("#rephrase textarea", "w6 w9")

    page.click("#ask")
    page.locator("table.answers").wait_for()
    (_, *head), *unedited = cells(page)
    assert head == ["Unedited"]
    assert len(unedited) == 3
    said = [answer for _, answer in unedited]
    page.fill("#target input, #target textarea", said[0])
    page.click("#edit")
    page.get_by_text("already: there is nothing to edit").wait_for()

    page.click("#editor input")
    page.get_by_role("option", name="liveedit").click()
    page.get_by_text("a low-rank expert for each edit").wait_for()
    page.fill("#target input, #target textarea", "w40 w41")
    page.click("#edit")
    page.get_by_text("Edited: asked “w5 w9 w7”, the model now says “w40 w41”").wait_for()
    (_, *head), *edited = cells(page)
    assert head == ["Before", "Under liveedit"]
    assert [row[1] for row in edited] == said
    assert edited[0][2] == "w40 w41"
    fits(page, folder / "edit")

    page.click("#undo")
    page.get_by_text("have the bits they had before, and the answers are those of").wait_for()
    (_, *head), *undone = cells(page)
    assert head == ["Before", "Under liveedit", "After undo"]
    assert [row[:3] for row in undone] == edited
    assert [row[3] for row in undone] == said
    assert page.locator("#undo").is_disabled()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_read(address, browser, folder, theme):
    with browser.new_context(viewport=DESK) as context:
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.goto(f"{address}?__theme={theme}")
        page.get_by_text("Features of 6 pictures are computed").wait_for()
        page.fill("#query textarea", "a yellow lion")
        page.press("#query textarea", "Enter")
        found(page, 1)
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)  # colours fade into each other
        assert page.evaluate(UNREADABLE) == []
        page.screenshot(path=folder / f"search-{theme}.png", full_page=True)
        page.get_by_role("tab", name="Edit").click()
        page.click("#edit")
        page.get_by_text("Choose a picture, or upload one").wait_for()
        page.wait_for_timeout(500)
        assert page.evaluate(UNREADABLE) == []
        file = folder / f"edit-{theme}.png"
        page.screenshot(path=file, full_page=True)
        with Image.open(file) as picture:
            background = max(picture.convert("RGB").resize((64, 64)).getcolors(64 * 64))[1]
        assert (sum(background) > 382) == (theme == "light")


def test_an_adapter_of_another_model_is_told_in_the_page(folder, browser):
    process, url = started(
        folder, folder / "other.txt", "--model", "zoo:tiny-clip",
        "--adapter", str(folder / "other"),
        "--images", str(folder / "images"),
    )  # fmt: skip
    try:
        with browser.new_context(viewport=PHONE) as context:
            page = context.new_page()
            page.set_default_timeout(WAIT)
            page.goto(url)
            page.get_by_text("The adapter cannot be used").wait_for()
            page.fill("#query textarea", "a bird")
            page.press("#query textarea", "Enter")
            assert len(found(page, 0)) == len(NAMES)
            assert page.locator("#side-1").count() == 0
            fits(page, folder / "other-adapter")
    finally:
        process.terminate()
        process.wait(30)
    assert "Traceback" not in (folder / "other.txt").read_text()
