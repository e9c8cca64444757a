"""Hand-made edit records, each defect of the published files among them."""

from __future__ import annotations

import json
from pathlib import Path

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"  # the published files, if present


def item(number=0, **changes):
    """A record without a defect, different for every number; a change to None takes a field out."""
    own = {
        "src": f"What is on shelf {number}?",
        "pred": "a jar",
        "alt": f"{number} cups",
        "rephrase": f"Which things stand on shelf {number}?",
        "image": f"shelves/{number}.png",
        "image_rephrase": f"other/{number}.png",
        "loc": f"who built tower {number}",
        "loc_ans": "Ada",
        "m_loc": f"around/{number}.png",
        "m_loc_q": "What colour is the door?",
        "m_loc_a": "green",
    }
    return {k: v for k, v in (own | changes).items() if v is not None}


def hop(**changes):
    return {
        "port_edit_q": "Who makes cups?",
        "port_edit_a": "a potter",
        "port_q": "Who makes what is on the shelf?",
        "port_a": "a potter",
    } | changes


def write(path, items):
    path.write_text(json.dumps(items), encoding="utf-8")
    return str(path)


def images_of(items):
    return sorted({i[name] for i in items for name in ("image", "image_rephrase", "m_loc")})
