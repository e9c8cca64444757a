import logging

import pytest
import torch

from data_builders.caption_prompts import CAPTION_PROMPTS
from data_builders.pictures import Pictures
from data_builders.samples import Rejected, Sample
from data_builders.stages.base import Context
from data_builders.stages.rephrase import (
    Chat,
    ChatOptions,
    Templates,
    TemplatesOptions,
    Wordings,
    WordingsOptions,
)
from editing.config import EditModelOptions
from mmtune.config import checked
from mmtune.data.records import DataError
from mmtune.yaml_source import YamlSource
from tests.data_builders.chatting import chat_folder


def context(tmp_path, seed=0):
    return Context(seed, EditModelOptions("zoo:tiny-llava"), Pictures({}), tmp_path)


class Said:
    """Stands in for a chat model: question -> what it says to each candidate in turn."""

    def __init__(self, answers):
        self.answers, self.batches = answers, []

    def write(self, conversations, seeds, max_tokens, temperature, top_p):
        self.batches.append(len(conversations))
        found = []
        for talk in conversations:
            question = talk[-1]["content"].rpartition("Question: ")[2]
            found.append(self.answers[question].pop(0))
        return found


def stage(tmp_path, answers, embed=None, **options):
    options = {"candidates": 1, "encoder": None, "examples": [], **options}
    made = Chat(ChatOptions(**options), context(tmp_path))
    made.chat = Said(answers)
    if embed is not None:
        made.embed = embed
    return made


def samples(*questions):
    return [Sample(str(n), question) for n, question in enumerate(questions)]


MAN, DOG = "What is the man holding?", "Is there a dog?"


def test_the_nearest_candidate_is_taken(tmp_path):
    said = {MAN: ["1. Who is a man?\n2. Which thing is the man holding?", "What is held?"]}
    (found,) = stage(tmp_path, said, candidates=2).run(samples(MAN))
    assert found.rephrase == "Which thing is the man holding?"


def test_samples_are_batched_and_answers_stay_with_their_own(tmp_path):
    said = {MAN: ["Which thing is the man holding?"] * 3, DOG: ["Can a dog be seen?"] * 3}
    made = stage(tmp_path, said, candidates=3, batch_size=4)
    assert [one.rephrase for one in made.run(samples(MAN, DOG))] == [
        "Which thing is the man holding?",
        "Can a dog be seen?",
    ]
    assert made.chat.batches == [4, 2]


def test_an_encoder_decides_where_there_is_one(tmp_path):
    vectors = {MAN: [1.0, 0], "What is held?": [0.8, 0.6], "Who is the man?": [0.6, 0.8]}
    said = {MAN: ["Who is the man?\nWhat is held?"]}

    def embed(texts):
        return torch.tensor([vectors[text] for text in texts])

    kept = stage(tmp_path, {MAN: [*said[MAN]]}, embed, encoder="any", similarity=0.75)
    assert kept.run(samples(MAN))[0].rephrase == "What is held?"
    strict = stage(tmp_path, {MAN: [*said[MAN]]}, embed, encoder="any", similarity=0.85)
    (found,) = strict.run(samples(MAN))
    assert found.reason == "no usable rewording: other meaning"
    assert "2 other meaning" in found.text


def test_reasons_are_counted(tmp_path):
    said = {MAN: ["What is the man holding", "He holds a bat.", "He holds it.", "I'm sorry."]}
    (found,) = stage(tmp_path, said, candidates=4).run(samples(MAN))
    assert found.reason == "no usable rewording: no question"
    assert "2 no question, 1 same wording, 1 refusal" in found.text
    assert MAN in found.text
    assert not found.fault


def test_a_model_that_refuses_is_named(tmp_path, caplog):
    refusals = ["I'm sorry, I can't.", "As an AI language model, I see nothing."]
    made = stage(tmp_path, {MAN: [*refusals], DOG: [*refusals]}, candidates=2, model="hf:a/b")
    with caplog.at_level(logging.WARNING):
        found = made.run(samples(MAN, DOG))
    assert {one.reason for one in found} == {"hf:a/b refuses to reword"}
    assert "I'm sorry" in found[0].text
    assert "hf:a/b refuses to reword" in caplog.text


def test_nothing_written(tmp_path):
    (found,) = stage(tmp_path, {MAN: [" \n"]}).run(samples(MAN))
    assert found.reason == "no usable rewording: nothing written"


def test_a_real_model_gives_the_same_whatever_the_batch_and_the_neighbours(tmp_path):
    name = chat_folder(tmp_path / "chat")
    asked = samples(*(f"What is w{n} w{n + 1}?" for n in range(3, 9)))

    def written(given, **options):
        own = ChatOptions(model=name, dtype="float32", encoder=None, max_tokens=6, **options)
        made = Chat(own, context(tmp_path))
        made.open()
        return made.written(given)

    whole = written(asked, candidates=2)
    assert whole == written(asked, candidates=2, batch_size=3)
    assert whole[2:4] == written(asked[2:4], candidates=2)
    assert whole != written(asked, candidates=2, seed=1)
    assert all(len(set(own)) == 2 for own in whole)  # candidates differ in their seeds


def test_the_conversation(tmp_path):
    made = Chat(ChatOptions(prompt="Say {question}", system="Be brief."), context(tmp_path))
    talk = made.conversation(MAN)
    assert talk[0] == {"role": "system", "content": "Be brief."}
    assert [turn["role"] for turn in talk[1:]] == ["user", "assistant"] * 3 + ["user"]
    assert talk[-1]["content"] == f"Say {MAN}"
    assert stage(tmp_path, {}, system="").conversation(MAN)[0]["role"] == "user"


def test_an_encoder_that_is_not_there_is_named(tmp_path):
    own = ChatOptions(model=chat_folder(tmp_path / "chat"), dtype="float32", encoder="/no/encoder")
    with pytest.raises(ValueError, match=r"rephrase.encoder: /no/encoder.*encoder: null"):
        Chat(own, context(tmp_path)).open()


def test_a_template_without_a_system_message_is_named(tmp_path):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    own = {"model": chat_folder(tmp_path / "chat", template), "dtype": "float32", "encoder": None}
    with pytest.raises(ValueError, match=r"System role not supported.*set system: ''"):
        Chat(ChatOptions(**own), context(tmp_path)).open()
    Chat(ChatOptions(**own, system=""), context(tmp_path)).open()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prompt": "Say it."}, "must hold {question}"),
        ({"prompt": "Say {question} in {language}"}, "must hold {question}"),
        ({"prompt": "Say {question"}, "must hold {question}"),
        ({"temperature": 0.0}, "temperature: 0 writes the same"),
        ({"similarity": 2}, "less than or equal to 1"),
        ({"longest": 26}, "less than or equal to 25"),
    ],
)
def test_settings_that_cannot_work(options, match):
    source = YamlSource("x.yaml", "", {}, {})
    checked(source, ("rephrase",), ChatOptions, options)
    assert [m for m in source.mistakes if match in str(m)]


def templates(tmp_path, seed=0, **options):
    made = Templates(TemplatesOptions(**options), context(tmp_path, seed))
    made.open()
    return made


def test_templates_are_drawn_by_sample(tmp_path):
    asked = [Sample(str(n), "a photo of") for n in range(200)]
    found = [one.rephrase for one in templates(tmp_path).run(asked)]
    assert set(found) == set(CAPTION_PROMPTS)
    assert found[50:60] == [one.rephrase for one in templates(tmp_path).run(asked[50:60])]
    assert found != [one.rephrase for one in templates(tmp_path, seed=1).run(asked)]


def test_a_template_is_not_the_question(tmp_path):
    made = templates(tmp_path, prompts=["A photo of", "a view of", " "])
    assert {one.rephrase for one in made.run(samples(*["a photo of"] * 20))} == {"a view of"}
    (found,) = templates(tmp_path, prompts=["A photo of."]).run(samples("a photo of"))
    assert isinstance(found, Rejected)


def test_a_list_of_ones_own(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\n\nshown here:\n", encoding="utf-8")
    made = templates(tmp_path, file=str(file))
    assert made.files() == [str(file)]
    assert made.run(samples("a photo of"))[0].rephrase == "shown here:"


@pytest.mark.parametrize("content", [None, b"# nothing\n\n", b"\xff\xfe\xff"])
def test_a_list_that_is_none_is_named(tmp_path, content):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"prompts\.txt"):
        templates(tmp_path, file=str(file))


def test_wordings_of_the_source(tmp_path):
    made = Wordings(WordingsOptions(), context(tmp_path))
    given = [
        Sample("0", MAN, fields={"rephrase": " Which thing does he hold? "}),
        Sample("1", MAN),
        Sample("2", MAN, fields={"rephrase": "what is the man holding"}),
        Sample("3", MAN, fields={"rephrase": '"What?"'}),
    ]
    found = made.run(given)
    assert found[0].rephrase == "Which thing does he hold?"
    assert [one.reason for one in found[1:]] == [
        "no second wording",
        "no usable rewording: same wording",
        "no usable rewording: talk around it",
    ]
