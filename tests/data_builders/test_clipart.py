"""The builder on a small folder made in place, with damage in it."""

import hashlib
import json
import random

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from data_builders.clipart import build, main
from data_builders.clipart_splits import SplitSizes

SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:cc="http://web.resource.org/cc/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<metadata><rdf:RDF><cc:Work><dc:title>{title}</dc:title>
<dc:subject><rdf:Bag><rdf:li>{keyword}</rdf:li></rdf:Bag></dc:subject>
<cc:license rdf:resource="{licence}"/></cc:Work></rdf:RDF></metadata></svg>"""
PUBLIC = "http://web.resource.org/cc/PublicDomain"
WORDS = "hammer saw chair lamp boat train bottle clock violin castle rocket tower helmet".split()
SIZES = SplitSizes(test=4, val=2)


def picture(seed, size=(160, 120)):
    draw = random.Random(seed)
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = draw.randrange(size[0] - 20), draw.randrange(size[1] - 20)
        box = (x, y, x + draw.randrange(8, 60), y + draw.randrange(8, 60))
        pen.rectangle(box, fill=tuple(draw.randrange(200) for _ in range(3)))
    return image


class Folder:
    def __init__(self, root):
        self.svg, self.png = root / "svg", root / "png"

    def add(self, path, title, keyword="thing", licence=PUBLIC, image=None, svg=None):
        for base in (self.svg, self.png):
            (base / path).parent.mkdir(parents=True, exist_ok=True)
        text = svg if svg is not None else SVG.format(title=title, keyword=keyword, licence=licence)
        (self.svg / f"{path}.svg").write_text(text)
        if image is not None:
            image.save(self.png / f"{path}.png")


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path / "clipart")
    for number, word in enumerate(WORDS):
        made.add(f"tools/{word}_01", word, image=picture(number))
    for number, word in enumerate(["lion", "eagle", "trout", "beetle", "horse", "goat", "owl"]):
        made.add(f"animals/{word}_01", word, "animal", image=picture(100 + number))
        made.add(f"food/{word}_pie", f"{word} pie", "meal", image=picture(200 + number))
    made.add("tools/broken_01", "broken", svg="<svg><metadata>", image=picture(300))
    made.add("tools/torn_01", "torn", image=picture(301))
    torn = made.png / "tools/torn_01.png"
    torn.write_bytes(torn.read_bytes()[:200])
    made.add("tools/missing_01", "missing")
    made.add("tools/gpl_01", "gpl", licence="GPL", image=picture(302))
    made.add("tools/blank_01", "blank", image=Image.new("RGBA", (40, 40), "white"))
    made.add("tools/twin_01", "twin", image=picture(0))
    made.add("tools/zz_hammer_02", "Hammer 2", image=picture(303))
    made.add("food/mallet_01", "mallet", image=picture(1).resize((320, 240)))
    (made.svg / "tools/link.svg").symlink_to(made.svg / "tools/hammer_01.svg")
    return made


def read(out):
    return {path.stem: pq.read_table(path).to_pylist() for path in sorted(out.glob("*.parquet"))}


def test_damage_is_named_and_counted(folder, tmp_path, caplog):
    summary = build(folder.svg, folder.png, tmp_path / "out", SIZES)
    rejected = summary["rejected"]
    assert rejected["broken SVG"] == 1
    assert rejected["broken or too large PNG"] == 1
    assert rejected["no PNG of that name"] == 1
    assert rejected["not stated to be public domain"] == 1
    assert rejected["blank on white"] == 1
    assert rejected["same pixels as another drawing"] == 1
    assert rejected["symbolic link to another drawing"] == 1
    for name in ("broken_01", "torn_01", "missing_01", "gpl_01"):
        assert any(f"tools/{name}.svg" in line for line in summary["named"])
        assert f"tools/{name}.svg" in caplog.text
    files = len(list(folder.svg.rglob("*.svg")))
    assert sum(summary["counts"].values()) + sum(rejected.values()) == files
    assert json.loads((tmp_path / "out/clipart.json").read_text()) == summary


def test_same_input_same_bytes(folder, tmp_path):
    digests = []
    for name in ("first", "second"):
        build(folder.svg, folder.png, tmp_path / name, SIZES)
        files = sorted((tmp_path / name).iterdir())
        digests.append([(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files])
    assert digests[0] == digests[1]
    assert not any(name.endswith(".tmp") for name, _ in digests[0])


def test_splits_keep_texts_and_near_duplicates_together(folder, tmp_path):
    build(folder.svg, folder.png, tmp_path / "out", SIZES)
    rows = read(tmp_path / "out")
    where = {row["id"]: name for name, some in rows.items() for row in some}
    assert len(rows["clipart-test"]) == len(rows["clipart-test-text"]) == 4
    hammers = [where.get("tools/hammer_01.svg"), where.get("tools/zz_hammer_02.svg")]
    assert len({name for name in hammers if name}) == 1  # a test holds one drawing a text
    # mallet.png is a scaled saw.png: the food record and the tool record are one component
    assert ("food/mallet_01.svg" in where) != ("tools/saw_01.svg" in where)
    for name, some in rows.items():
        for row in some:
            held_out = row["category"] if row["category"] in ("animals", "food") else None
            assert name.startswith(f"clipart-{held_out}-" if held_out else "clipart-t") or (
                held_out is None and name == "clipart-val"
            )


def test_pictures_are_small_and_on_white(folder, tmp_path):
    import io

    build(folder.svg, folder.png, tmp_path / "out", SIZES)
    for some in read(tmp_path / "out").values():
        for row in some:
            image = Image.open(io.BytesIO(row["image"]["bytes"]))
            assert image.mode == "RGB"
            assert max(image.size) <= 128
            assert row["image"]["path"].endswith(".webp")


def test_missing_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="openclipart-svg"):
        build(tmp_path / "no", tmp_path, tmp_path / "out", SIZES)
    with pytest.raises(FileNotFoundError, match=r"holds no \.svg"):
        build(tmp_path, tmp_path, tmp_path / "out", SIZES)


def test_command_line(folder, tmp_path):
    out = tmp_path / "out"
    main(["--svg", str(folder.svg), "--png", str(folder.png), "--out", str(out)])
    assert (out / "clipart-train.parquet").is_file()
