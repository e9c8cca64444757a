"""Docstrings are taken apart without losing a word."""

from __future__ import annotations

from dataclasses import dataclass

from mmtune.reference.docstrings import Block, option_texts, parse

TEXT = """One line.

    Words that go on
    over two lines:

        y = W x
            + b      two lines

    Trainable parameters: d for each
    layer.

    More.

    Args:
        rank, alpha: of it,
            and more: a colon.
        seed: see `Base`; seed must be 3.

    Source:
        A paper, section 2. Differs in
        nothing.
    """


def test_every_part_is_found():
    docs = parse(TEXT)
    assert docs.summary == "One line."
    assert docs.body == [
        Block("Words that go on over two lines:"),
        Block("y = W x\n    + b      two lines", equation=True),
        Block("More."),
    ]
    assert docs.equations == ["y = W x\n    + b      two lines"]
    assert docs.count == "Trainable parameters: d for each layer."
    assert docs.source == "A paper, section 2. Differs in nothing."
    both = "of it, and more: a colon."
    assert docs.options == {"rank": both, "alpha": both, "seed": "see `Base`; seed must be 3."}


def test_a_source_may_be_a_paragraph_and_nothing_may_be_said():
    assert parse("Line.\n\nSource: somebody, somewhere.\n").source == "somebody, somewhere."
    assert parse(None) == parse("")
    assert parse(None).body == []


@dataclass
class Base:
    """Of all.

    Args:
        seed: of what is drawn.
        size: of it.
    """

    seed: int = 0
    size: int = 1


@dataclass
class Special(Base):
    """Of one.

    Args:
        size: another.
        seed: see `Base`; seed must be 3.
    """

    word: str = ""


def test_what_a_base_says_counts_where_the_class_refers_to_it():
    assert option_texts(Special) == {
        "seed": "of what is drawn. Seed must be 3.",
        "size": "another.",
    }
