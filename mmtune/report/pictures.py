"""Pictures as data URIs, small enough that a report stays a file to send by mail."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

EDGE = 160  # pixels; shown at 112 CSS pixels, so sharp on a screen of 1.5 pixels a point
WIDE = 3  # edges: the width of a picture that is wide, such as a film strip
BUDGET = 4_000_000  # characters of all data URIs of one report


class Pictures:
    """Turns pictures into data URIs until `budget` characters are spent."""

    def __init__(self, edge: int = EDGE, budget: int = BUDGET) -> None:
        self.edge, self.left = edge, budget
        self.left_out = 0

    def uri(self, image: Image) -> str:
        """A JPEG data URI on white, at most `edge` pixels a side; "" once the budget is spent.

        A wide picture may have `WIDE` times the width.
        """
        from PIL import Image as pil

        image = image.copy()
        image.thumbnail((self.edge * (WIDE if is_wide(image) else 1), self.edge))
        if image.mode not in ("RGB", "L"):
            with_alpha = image.convert("RGBA")
            image = pil.new("RGB", with_alpha.size, "white")
            image.paste(with_alpha, mask=with_alpha.getchannel("A"))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=82, optimize=True)
        text = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        if len(text) > self.left:
            self.left_out += 1
            return ""
        self.left -= len(text)
        return text


def is_wide(image: Image) -> bool:
    """Whether a picture is at least twice as wide as high, and gets a row of its own."""
    return image.width >= 2 * image.height
