import pytest

from data_builders.sources.openclipart import (
    BrokenDrawing,
    RawDrawing,
    describe,
    is_public_domain,
    normalise,
    read_drawing,
)


def raw(path, title="", keywords=(), description="", creator="", licence="PublicDomain"):
    return RawDrawing(path, title, tuple(keywords), description, creator, licence)


def caption(*args, **kwargs):
    (text,) = describe([raw(*args, **kwargs)])
    return None if text is None else text.caption


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("animals/birds/acquila_architetto_01.svg", "Acquila", ["bird"]), "eagle, bird, animals"),
        (("animals/mammals/tigre02_architetto_01.svg", "Tigre02"), "tiger, mammals, animals"),
        (("signs_and_symbols/flags/africa/chad.svg", "chad"), "flag of chad, africa"),
        (
            ("recreation/games/cards/simple/simple_h_2.svg", "card"),
            "two of hearts, simple playing card, games",
        ),
    ],
)
def test_captions(arguments, expected):
    assert caption(*arguments) == expected


def test_authors_numbers_and_boilerplate_leave_no_trace():
    found = caption(
        "tools/saw_jane_doe_01.svg",
        "Saw 12 by Jane Doe jane@doe.org",
        ["hash", "HASH(0x874ce84)", "work", "jane doe"],
        description="converted from http://doe.org",
        creator="Jane Doe",
    )
    assert found == "saw, work"


def test_short_description_takes_the_place_of_keywords():
    found = caption("buildings/house_01.svg", "House", ["home"], "A house with a red roof. Enjoy!")
    assert found == "house, a house with a red roof"


def test_a_collection_title_yields_to_the_file_name():
    drawings = [
        raw(f"computer/icons/x/{name}.svg", "Lemon SVG theme")
        for name in ("folder_sound", "view_right", "fileopen")
    ]
    titles = [text.title for text in describe(drawings)]
    assert titles == ["folder sound icon", "view right icon", "open file icon"]


def test_no_words_means_no_text():
    assert describe([raw("unsorted/001.svg", "001")]) == [None]


def test_an_icon_of_jargon_is_left_out_until_another_title_uses_its_word():
    lone = raw("computer/icons/qwzx.svg", "qwzx")
    assert describe([lone]) == [None]
    other = raw("tools/qwzx_hammer.svg", "Qwzx hammer")
    assert describe([lone, other])[0].title == "qwzx icon"


def test_normalise_ignores_numbers_case_and_accents():
    assert normalise("Tête 02,  ROUGE!") == normalise("tete rouge")


def test_licence_must_be_stated():
    assert is_public_domain(raw("a.svg", licence="http://web.resource.org/cc/PublicDomain"))
    assert not is_public_domain(
        raw("a.svg", licence="http://creativecommons.org/licenses/GPL/2.0/")
    )
    assert not is_public_domain(raw("a.svg", licence=""))


@pytest.mark.parametrize("content", ["<svg><title>", "", "<html/>", "\x00\x01"])
def test_a_broken_svg_is_named(tmp_path, content):
    path = tmp_path / "tools" / "bad.svg"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(BrokenDrawing, match=r"tools/bad\.svg"):
        read_drawing(tmp_path, path)
