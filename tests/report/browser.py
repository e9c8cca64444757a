"""Pages in a real browser: whether everything fits and every picture loads."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (found := shutil.which(name))
    ),
    None,
)
WIDTHS = (1280, 500)  # CSS pixels; a headless browser has no narrower window
MEASURE = """
<script>
addEventListener("load", () => {
  const wide = document.documentElement.clientWidth;
  const scrolls = (e) => e && (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)
    || scrolls(e.parentElement));
  const beyond = [...document.body.querySelectorAll("*")].filter((e) =>
    e.getBoundingClientRect().right > wide + 1 && !scrolls(e.parentElement) && !e.closest("svg"));
  const images = [...document.images];
  const found = {
    wide, scrolls: document.documentElement.scrollWidth > wide,
    beyond: beyond.map((e) => e.outerHTML.slice(0, 200)),
    images: images.length, broken: images.filter((i) => !i.naturalWidth).map((i) => i.alt),
    others: performance.getEntriesByType("resource").map((r) => r.name.slice(0, 80))
      .filter((name) => !name.startsWith("data:")),
  };
  const note = document.createElement("pre");
  note.id = "measured"; note.textContent = JSON.stringify(found);
  document.body.append(note);
});
</script>
"""


def looks_right(page, folder):
    """Assert that a page fits on a desk and on a phone, light and dark, and loads all it shows.

    Its screenshots are left in `folder`; they are pictures of something, not of one colour.
    """
    if BROWSER is None:
        pytest.skip("no Chromium here")
    copy = folder / "measured.html"
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    for width in WIDTHS:
        found = measured(copy, width)
        assert not found["scrolls"], f"{page.name} is wider than {found['wide']} pixels"
        assert not found["beyond"], found["beyond"]
        assert not found["broken"], found["broken"]
        assert not found["others"], f"{page.name} loads other files: {found['others']}"
        assert found["images"] == len(re.findall(r"<img\b", text))
        for scheme in (0, 1):
            shot = folder / f"{page.stem}-{width}-{('dark', 'light')[scheme]}.png"
            run(f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},1400",
                f"--screenshot={shot}", page.resolve().as_uri())  # fmt: skip
            with Image.open(shot) as picture:
                colours = picture.convert("RGB").resize((64, 64)).getcolors(64 * 64)
            assert len(colours) > 8
            background = max(colours)[1]
            assert (sum(background) > 382) == (scheme == 1), background


def measured(page, width):
    """What the script above found out in a window so wide."""
    text = run("--virtual-time-budget=4000", f"--window-size={width},1400", "--dump-dom",
               page.resolve().as_uri())  # fmt: skip
    found = re.search(r'<pre id="measured">(.*?)</pre>', text, re.DOTALL)
    assert found, text[-500:]
    return json.loads(html.unescape(found[1]))


def run(*arguments):
    """Run the browser; returns what it prints."""
    fixed = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    done = subprocess.run(
        [BROWSER, *fixed, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout
