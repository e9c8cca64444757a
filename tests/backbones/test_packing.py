"""Several prompts as few rows: each token sees its own prompt, and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.backbones.mllm_generation import likeliest_alone
from mmtune.backbones.packing import Prompt, cost_of, packing, planned, shared_lengths
from mmtune.conformance import mllms

IMAGE = 9


@st.composite
def prompts(draw):
    """Prompts of words 0..3; some begin with words and an image, with equal or other words."""
    made, first = [], 0
    for _ in range(draw(st.integers(1, 7))):
        words = draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))
        image = draw(st.sampled_from([None, 0, 1]))
        ids = words
        if image is not None:
            ids = [*draw(st.lists(st.integers(0, 1), max_size=2)), IMAGE, IMAGE, *words]
        opening = ids.index(IMAGE) + 2 if image is not None else 0
        behind = draw(st.integers(0, 3))
        made.append((ids, first, image, opening, behind))
        first += len(ids) + draw(st.integers(0, 2))  # padding of the context
    return [
        Prompt(ids, start, image, opening, (first + 10 * n, behind))
        for n, (ids, start, image, opening, behind) in enumerate(made)
    ]


@given(prompts(), st.integers(1, 64))
@settings(deadline=None, max_examples=60)
def test_each_token_sees_its_prompt_up_to_itself_in_order(made, width):
    plan = planned(made, width)
    found = packing(made, plan, 4, "cpu")
    token = {p.first + i: token for p in made for i, token in enumerate(p.ids)}
    assert sorted(g for row in plan.rows for g in row) == list(range(len(plan.groups)))
    assert found.source.shape == (len(plan.rows), plan.length)
    for number, prompt in enumerate(made):
        row = int(found.row[number])
        for t in range(4):
            at = int(found.predicts[number, t]) - row * plan.length
            read = len(prompt.ids) + min(t, prompt.behind[1])
            seen = found.seen[row, 0, at].nonzero()[:, 0]
            assert seen[-1] == at
            assert found.positions[row, seen].tolist() == list(range(read))
            sources = found.source[row, seen].tolist()
            assert [token[s] for s in sources[: len(prompt.ids)]] == list(prompt.ids)
            start = prompt.behind[0]
            assert sources[len(prompt.ids) :] == list(range(start, start + read - len(prompt.ids)))
        own = found.own[number].nonzero()[:, 0]
        assert found.positions[row, own].tolist() == list(range(len(prompt.ids)))
    slots = list(zip(found.row.tolist(), found.slot.tolist(), strict=True))
    assert len(set(slots)) == len(made)


@given(prompts())
@settings(deadline=None, max_examples=30)
def test_rows_cost_no_more_than_one_row_or_a_row_for_each_group(made):
    plan = planned(made, 8)
    lengths = [
        sum(len(made[n]) - plan.shared.get(made[n].image, 0) for n in group)
        + plan.shared.get(made[group[0]].image, 0)
        for group in plan.groups
    ]
    up = [-(-size // 8) * 8 for size in (sum(lengths), max(lengths))]
    assert plan.cost <= cost_of(1, up[0], 8)
    assert plan.cost <= cost_of(len(lengths), up[1], 8)


def test_what_is_shared_reaches_behind_the_image_and_leaves_each_a_token():
    def prompt(ids, image=0):
        return Prompt(ids, 0, image, ids.index(IMAGE) + 1 if IMAGE in ids else 0)

    assert shared_lengths([prompt([1, IMAGE, 2, 3]), prompt([1, IMAGE, 2, 4, 5])]) == {0: 3}
    assert shared_lengths([prompt([1, IMAGE, 2]), prompt([1, IMAGE, 2])]) == {0: 2}
    assert shared_lengths([prompt([1, 2, IMAGE, 3]), prompt([2, 2, IMAGE, 3])]) == {}
    assert shared_lengths([prompt([1, IMAGE]), prompt([1, IMAGE, 2])]) == {}
    assert shared_lengths([prompt([1, IMAGE, 2])]) == {}
    assert shared_lengths([prompt([1, 2], None), prompt([1, 2], None)]) == {}


@pytest.mark.parametrize(
    ("setting", "value", "alone"),
    [
        ("max_length", 77, True),
        ("repetition_penalty", 1.2, False),
        ("suppress_tokens", [3], False),
        ("no_repeat_ngram_size", 2, False),
    ],
)
def test_what_a_checkpoint_says_about_writing_is_not_passed_over(setting, value, alone):
    model = mllms.llava()
    assert likeliest_alone(model)
    setattr(model.generation_config, setting, value)
    assert likeliest_alone(model) is alone
