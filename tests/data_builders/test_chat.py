import pytest
import torch

from data_builders.chat import UNFINISHED, ChatModel, Drawn
from tests.data_builders.chatting import chat_folder

TALKS = [[{"role": "user", "content": " ".join(f"w{3 + (7 * i) % 50}" for i in range(n))}]
         for n in (4, 9, 2, 30, 1)]  # fmt: skip
SEEDS = [11, 12, 13, 14, 15]


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def chat(name):
    return ChatModel(name)


def test_an_answer_does_not_depend_on_its_neighbours(chat):
    together = chat.write(TALKS, SEEDS, 12, 1.0, 0.9)
    alone = [chat.write([t], [s], 12, 1.0, 0.9)[0] for t, s in zip(TALKS, SEEDS, strict=True)]
    backwards = chat.write(TALKS[::-1], SEEDS[::-1], 12, 1.0, 0.9)[::-1]
    assert together == alone == backwards
    assert len(set(together)) == len(TALKS)


def test_nor_on_what_was_drawn_before_in_the_process(chat):
    first = chat.write(TALKS[:2], SEEDS[:2], 8, 1.0)
    torch.manual_seed(99)
    assert chat.write(TALKS[:2], SEEDS[:2], 8, 1.0) == first
    assert chat.write(TALKS[:2], [1, 2], 8, 1.0) != first


def test_without_temperature_it_is_the_likeliest_whatever_the_seed(chat):
    found = chat.write(TALKS, SEEDS, 8)
    assert found == chat.write(TALKS, SEEDS[::-1], 8)
    text = chat.text(TALKS[0])
    ids = chat.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    for _ in range(8):
        with torch.no_grad():
            likely = chat.model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, likely[None, None]], dim=1)
    expected = chat.tokenizer.decode(ids[0, -8:], skip_special_tokens=True)
    assert found[0] == expected + UNFINISHED


def test_an_answer_that_ends_is_whole(chat):
    """Whose likeliest token is made the end."""
    head = chat.model.lm_head.weight
    kept = head.data.clone()
    try:
        head.data[2] = 1e4 * head.data.mean(0)
        head.data[3] = -head.data[2]
        found = chat.write(TALKS, SEEDS, 8)
    finally:
        head.data.copy_(kept)
    assert not all(one.endswith(UNFINISHED) for one in found)


def test_tokens_are_drawn_with_their_probability():
    scores = torch.tensor([[2.0, 0.0, 1.0, -3.0]])
    count = 20_000
    numbers = torch.rand(count, 1, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(count, 5, dtype=torch.long)
    drawn = Drawn(numbers, 5, temperature=0.7, top_p=1.0)(ids, scores.expand(count, -1))
    assert ((drawn == 0).sum(-1) == 1).all()
    share = (drawn == 0).float().mean(0)
    expected = torch.softmax(scores[0] / 0.7, -1)
    assert (share - expected).abs().max() < 4 * 0.5 / count**0.5


def test_top_p_keeps_the_likeliest_that_reach_it():
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.81, 3), (1.0, 4)):
        numbers = torch.linspace(0, 0.999999, 500)[:, None]
        ids = torch.zeros(500, 1, dtype=torch.long)
        drawn = Drawn(numbers, 1, 1.0, top_p)(ids, scores.expand(500, -1))
        assert sorted((drawn == 0).nonzero()[:, 1].unique().tolist()) == list(range(kept))


def test_a_number_next_to_one_still_falls_on_a_token():
    scores = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0))
    number = torch.tensor([[1 - 2**-24]])
    drawn = Drawn(number, 0, 1.0, 0.9)(torch.zeros(1, 0, dtype=torch.long), scores)
    assert (drawn == 0).sum() == 1


@pytest.mark.parametrize(
    ("which", "match"),
    [
        ("gpt", "no chat model 'gpt'; expected hf:"),
        ("hf:./no/such/folder", "there is no folder"),
        ("hf:", "no chat model"),
    ],
)
def test_names_that_are_none(which, match):
    with pytest.raises(ValueError, match=match):
        ChatModel(which)


def test_a_folder_that_holds_no_language_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot be loaded as a language model.*Expected hf:"):
        ChatModel(f"hf:{tmp_path}")


def test_a_model_that_does_not_chat_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no chat template.*-Instruct"):
        ChatModel(chat_folder(tmp_path, None))
