"""Steady questions, and that locality leaks nowhere."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_builders.pictures import MADE, Pictures
from data_builders.samples import Rejected, Sample
from data_builders.sources.okvqa import OkVqa, OkVqaOptions
from data_builders.stages import locality, stages
from data_builders.stages.base import Context
from data_builders.stages.locality import LocalityOptions, Twice, TwiceOptions, join
from editing.config import EditModelOptions
from editing.requests import Probe
from mmtune.data.texts import normalised
from tests.editing.edit_items import DATA
from tests.editing.tiny import picture, tiny

AGAIN = "{question} Answer briefly."


def twice_in(folder, model=None, **options):
    pictures = Pictures({"source": folder, MADE: folder / "made"})
    context = Context(0, EditModelOptions("tiny"), pictures, folder)
    stage = Twice(TwiceOptions(**options), context)
    if model is not None:
        stage.answer = model
    return stage


def says(answers, asked):
    def answer(probes):
        asked.extend(probe.question for probe in probes)
        return [answers[probe.question] for probe in probes]

    return answer


FACTS = [
    Sample("steady", "Capital of France?", answers=("Paris",)),
    Sample("moody", "Capital of Italy?", answers=("Rome",), fields={"rephrase": "Italy's?"}),
    Sample("wrong", "Capital of Spain?", answers=("Madrid",)),
    Sample("silent", "Capital of Japan?", answers=("Tokyo",)),
    Sample("long", "Capital of Cuba?", answers=("Havana",)),
]
SAID = {
    FACTS[0].question: "It is Paris.",
    AGAIN.replace("{question}", FACTS[0].question): "it is Paris",
    FACTS[1].question: "Rome",
    "Italy's?": "It is Rome.",
    FACTS[2].question: "Paris",
    AGAIN.replace("{question}", FACTS[2].question): "Paris",
    FACTS[3].question: " . ",
    FACTS[4].question: "Havana " * 17,
}


def test_the_stage_is_registered():
    assert stages()["consistent"] == {"twice": Twice}


def test_only_what_is_answered_in_the_same_words_twice_is_kept(tmp_path):
    asked = []
    found = twice_in(tmp_path, says(SAID, asked)).run(FACTS)
    assert [getattr(o, "reason", "") for o in found] == [
        "",
        "answers differ",
        "the model is wrong",
        "no answer",
        "answer too long",
    ]
    assert not any(o.fault for o in found[1:])
    assert (found[0].target, found[0].prediction) == ("It is Paris.", "It is Paris.")
    # What cannot be kept anyway is not asked again; the source's own wording goes first.
    assert asked == [s.question for s in FACTS] + [
        AGAIN.replace("{question}", FACTS[0].question),
        "Italy's?",
    ]


def test_settings_say_whose_answer_is_kept(tmp_path):
    data = twice_in(tmp_path, says(SAID, []), answer="data").run(FACTS[:1])
    assert data[0].target == "Paris"
    either = twice_in(tmp_path, says(SAID, []), require_right=False).run(FACTS[2:3])
    assert either[0].target == "Paris"  # wrong, and steady
    both = twice_in(tmp_path, says(SAID, []), require_right=False, answer="data")
    assert both.run(FACTS[2:3])[0].target == "Paris"  # the data's only where the model is right
    for again in ("{question}", " {question} ", "Well?"):
        with pytest.raises(ValueError, match="again must hold"):
            TwiceOptions(again=again)


def test_about_an_image_right_is_what_annotators_said(tmp_path):
    (tmp_path / "1.png").write_bytes(picture(1).data)
    sample = Sample("s", "q", "source:1.png", ("cat",) * 7 + ("kitten",) * 3)
    for said, kept in (("a cat", True), ("kitten", True), ("It is a cat.", False)):
        answers = {"q": said, "q Answer briefly.": said}
        (found,) = twice_in(tmp_path, says(answers, [])).run([sample])
        assert isinstance(found, Sample) == kept
        if kept:
            assert found.target == said


def test_a_real_model_is_asked_twice_and_broken_images_are_faults(tmp_path, monkeypatch):
    mllm = tiny("llava")
    monkeypatch.setattr(locality, "open_model", lambda context: mllm)
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(picture(i).data[: 150 if i == 2 else None])
    samples = [Sample(f"s{i}", f"w{i + 5} w9", f"source:{i}.png", ("w1",)) for i in range(6)]
    stage = twice_in(tmp_path, again="w30 {question} w31", require_right=False, max_words=99)
    stage.open()
    found = stage.run(samples)
    assert (found[2].reason, found[2].fault) == ("truncated image", True)
    for sample, outcome in zip(samples, found, strict=True):
        if sample.id == "s2":
            continue
        image = stage.context.pictures.file(sample.image)
        asked = [Probe(q, "w1", image) for q in (sample.question, f"w30 {sample.question} w31")]
        first, second = mllm.answer(asked)
        if isinstance(outcome, Sample):
            assert normalised(first) == normalised(second)
            assert outcome.target == first
        else:
            assert outcome.reason == "answers differ"
            assert first != second
    kinds = Counter(type(outcome) for outcome in found)
    assert kinds[Rejected] > 1  # the second question does make a difference


def draw(folder, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for n in numbers:
        Image.new("RGB", (4, 4), (n % 256, n // 256, 7)).save(folder / f"{n}.png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Equal numbers are equal pictures, in whichever root."""
    folder = tmp_path_factory.mktemp("pictures")
    roots = {name: folder / name for name in ("source", "image", MADE)}
    for root in roots.values():
        draw(root, range(40))
    return Pictures(roots)


def edit(name, image, other, **more):
    values = {"target": "t", "concept": "", "fields": {}} | more
    image, other = f"source:{image}.png", f"made:{other}.png"
    return Sample(name, f"q {name}?", image, ("t",), image_rephrase=other, **values)


def seen(name, image, answer="a", concept="", kind=""):
    fields = {"kind": kind} if kind else {}
    made = Sample(name, f"pool {name}?", f"image:{image}.png", (answer,), concept=concept)
    return made.with_(target=answer, fields=fields)


def fact(name, answer="a"):
    return Sample(name, f"fact {name}?", answers=(answer,), target=answer)


NUMBER = st.integers(0, 12)
EDITS = st.lists(st.tuples(NUMBER, NUMBER, st.sampled_from("tuv")), max_size=8)
SEEN = st.lists(st.tuples(NUMBER, st.sampled_from("tuv"), st.sampled_from(["", "x"])), max_size=14)
TEXT = st.lists(st.tuples(st.integers(0, 9), st.sampled_from("tuv")), max_size=8)
quick = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(EDITS, SEEN, TEXT, st.booleans(), st.integers(0, 2), st.randoms(use_true_random=False))
def test_nothing_leaks_and_order_does_not_matter(
    pictures, edits, pool, facts, reuse, seed, shuffling
):
    samples = [edit(f"s{i}", a, b, target=t) for i, (a, b, t) in enumerate(edits)]
    images = [seen(f"i{i}", n, answer, kind=kind) for i, (n, answer, kind) in enumerate(pool)]
    texts = [fact(f"{n}", answer) for n, answer in facts]
    own = LocalityOptions(reuse=reuse)
    found = join(samples, texts, images, seed, own, pictures)
    assert [o.id for o in found] == [s.id for s in samples]
    kept = [o for o in found if isinstance(o, Sample)]

    homes = {}
    for o in kept:
        assert o.split in ("train", "eval")
        refs = [o.image, o.image_rephrase, o.image_locality.image]
        for key in [*map(pictures.digest, refs), o.text_locality.question]:
            homes.setdefault(key, set()).add(o.split)
        assert o.text_locality.answer != o.target != o.image_locality.answer
    assert all(len(splits) == 1 for splits in homes.values())
    scope = {pictures.digest(r) for s in samples for r in (s.image, s.image_rephrase)}
    assert not scope & {pictures.digest(o.image_locality.image) for o in kept}
    if not reuse:
        asked = [(o.image_locality.image, o.image_locality.question) for o in kept]
        assert len(set(asked)) == len(asked)
        assert len({o.text_locality.question for o in kept}) == len(kept)

    before = {o.id: o for o in found}
    for part in (samples, images, texts):
        shuffling.shuffle(part)
    again = join(samples, texts, images, seed, own, pictures)
    assert {o.id: o for o in again if isinstance(o, Sample)} == {
        name: o for name, o in before.items() if isinstance(o, Sample)
    }


def test_a_large_pool_serves_every_sample_once(pictures):
    samples = [edit(f"s{i}", i, i) for i in range(10)]
    images = [seen(f"i{i}", 10 + i) for i in range(12)]
    texts = [fact(f"t{i}") for i in range(10)]
    found = join(samples, texts, images, 0, LocalityOptions(), pictures)
    assert Counter(o.split for o in found) == {"train": 8, "eval": 2}
    assert (
        len({o.image_locality.id for o in found}) == len({o.text_locality.id for o in found}) == 10
    )
    keeper = found[0].image_locality
    origin = next(s for s in images if s.id == keeper.id)
    assert (keeper.question, keeper.answer, keeper.image) == (
        origin.question, origin.target, origin.image
    )  # fmt: skip


def test_a_small_pool_is_used_again_only_where_that_is_allowed(pictures):
    samples = [edit(f"s{i}", i, i) for i in range(12)]
    images = [seen(f"i{i}", 20 + i) for i in range(5)]
    texts = [fact(f"t{i}") for i in range(5)]
    once = join(samples, texts, images, 0, LocalityOptions({"all": 1}), pictures)
    assert Counter(type(o) for o in once) == {Sample: 5, Rejected: 7}
    left = [o for o in once if isinstance(o, Rejected)]
    assert {(o.reason, o.fault) for o in left} == {("no keeper left", False)}
    assert "text and image pool" in left[0].text
    assert "locality.reuse" in left[0].text
    again = join(samples, texts, images, 0, LocalityOptions({"all": 1}, reuse=True), pictures)
    uses = Counter(o.image_locality.id for o in again)
    assert sorted(uses.values()) == [2, 2, 2, 3, 3]
    assert sorted(Counter(o.text_locality.id for o in again).values()) == [2, 2, 2, 3, 3]


def test_no_pool_serves_nobody(pictures):
    samples = [edit("s", 1, 2)]
    for texts, images, which in (([], [seen("i", 9)], "text"), ([fact("t")], [], "image")):
        (found,) = join(samples, texts, images, 0, LocalityOptions(reuse=True), pictures)
        assert found.reason == "no keeper left"
        assert found.text.startswith(f"{which} pool")
    assert join([], [fact("t")], [], 0, LocalityOptions(), pictures) == []


@pytest.mark.parametrize("seed", range(6))
def test_another_thing_comes_first_then_the_same_kind_of_question(pictures, seed):
    sample = edit("s", 0, 1, target="lamp", concept="lamp", fields={"kind": "name"})
    own = LocalityOptions({"all": 1}, reuse=True)
    pool = [
        seen("same thing, same kind", 2, "light", "lamp", "name"),
        seen("other thing, target", 3, "Lamp.", "tree", "name"),
        seen("other thing, other kind", 4, "plant", "tree", "kind"),
        seen("other thing, same kind", 5, "tree", "tree", "name"),
    ]
    order = []
    while pool:
        (found,) = join([sample], [fact("t")], pool, seed, own, pictures)
        if isinstance(found, Rejected):
            break
        order.append(found.image_locality.id)
        pool = [one for one in pool if one.id != order[-1]]
    assert order == [
        "other thing, same kind",
        "other thing, other kind",
        "same thing, same kind",
    ]
    assert [one.id for one in pool] == ["other thing, target"]


def test_a_copy_of_an_edited_image_is_known_by_its_bytes(pictures):
    (pictures.roots["image"] / "sub").mkdir(exist_ok=True)
    copy = pictures.roots["image"] / "sub" / "copy.png"
    copy.write_bytes((pictures.roots["source"] / "3.png").read_bytes())
    copied = seen("copy", "sub/copy")
    (found,) = join([edit("s", 3, 4)], [fact("t")], [copied], 0, LocalityOptions(), pictures)
    assert found.reason == "no keeper left"
    other = edit("other", 5, 3)  # generalises to what the first one edits
    both = join([edit("s", 3, 4), other, edit("x", 8, 9)], [], [], 0, LocalityOptions(), pictures)
    assert len({o.text.split("split ")[1].split(":")[0] for o in both[:2]}) == 1


def test_a_split_that_is_given_stays_and_leads_its_images(pictures):
    samples = [
        edit("a", 1, 2, split="eval"),
        edit("b", 2, 3),
        edit("c", 3, 4, split="eval"),
        edit("d", 4, 5, split="train"),
    ]
    images, texts = [seen(f"i{i}", 20 + i) for i in range(4)], [fact(f"t{i}") for i in range(4)]
    found = join(samples, texts, images, 0, LocalityOptions(), pictures)
    assert [o.split for o in found[:3]] == ["eval"] * 3
    assert (found[3].reason, found[3].fault) == ("image in another split", False)


def test_images_that_cannot_be_read_are_faults_or_left_out(pictures, caplog):
    samples = [edit("bad", "none", 1), edit("good", 2, 3)]
    pool = [seen("gone", "none"), seen("there", 9)]
    found = join(samples, [fact("t")], pool, 0, LocalityOptions({"all": 1}), pictures)
    assert (found[0].reason, found[0].fault) == ("missing image", True)
    assert found[1].image_locality.id == "there"
    assert "left out: missing image" in caplog.text


@pytest.mark.parametrize(
    ("splits", "got"), [({}, "none"), ({"../x": 1.0}, "'../x'"), ({"": 1.0}, "''")]
)
def test_splits_are_names_of_files(splits, got):
    with pytest.raises(ValueError, match=f"splits must be named.*got {got}"):
        LocalityOptions(splits)


REAL = DATA / "mmedit" / "okvqa_loc.json"


@pytest.mark.skipif(not REAL.is_file(), reason="the published pool is not here")
def test_the_published_pool_serves_the_published_questions_without_their_leaks(tmp_path):
    """845 images are in both published splits, and 155 edit images in the pool."""
    pool_items = json.loads(REAL.read_text())
    items = json.loads((REAL.parent / "vqa_eval.json").read_text())
    names = {i["image"] for i in items} | {p["image"] for p in pool_items}
    (tmp_path / "val2014").mkdir()
    for name in names | {i["image_rephrase"] for i in items}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)  # a picture is its bytes here
    pictures = Pictures({"source": tmp_path, "image": tmp_path})
    source = OkVqa(OkVqaOptions(str(REAL), images=str(tmp_path)), "image")
    pool = [s for s in source.read(pictures) if isinstance(s, Sample)]
    samples = [
        Sample(
            f"{n}", i["src"], f"source:{i['image']}", (i["alt"],), target=i["alt"],
            image_rephrase=f"source:{i['image_rephrase']}",
        )
        for n, i in enumerate(items)
    ]  # fmt: skip
    texts = [fact(f"{n}", "x y z") for n in range(len(samples))]
    found = join(samples, texts, pool, 0, LocalityOptions(), pictures)
    kept = [o for o in found if isinstance(o, Sample)]
    assert len(kept) >= 0.99 * len(samples)
    assert len({o.image_locality.id for o in kept}) == len(kept)
    edited = {s.image for s in samples}
    assert not edited & {o.image_locality.image.replace("image:", "source:") for o in kept}
    homes = {}
    for o in kept:
        for key in (o.image, o.image_locality.image):
            homes.setdefault(key.partition(":")[2], set()).add(o.split)
    assert all(len(splits) == 1 for splits in homes.values())
    shares = Counter(o.split for o in kept)
    assert abs(shares["eval"] / len(kept) - 0.2) < 0.01
