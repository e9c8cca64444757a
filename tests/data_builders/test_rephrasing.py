import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_builders.rephrasing import PAIRS, candidates_of, unquoted
from editing.audit.rephrases import has_lines, has_talk

A, B, C = "What animal is it?", "Which animal is this?", "What creature can be seen?"

# What chat models write, or have been seen to write in published files -> the candidates in it.
OUTPUTS = {
    A: [A],
    f"  {A}\n": [A],
    f'"{A}"': [A],
    f"“{A}”": [A],
    f"„{A}“": [A],
    f"«{A}»": [A],
    f"‘{A}’": [A],
    f"「{A}」": [A],
    f"`{A}`": [A],
    f'"{A}': [A],
    f'{A}"': [A],
    f'"“{A}”"': [A],
    f"**{A}**": [A],
    f"*{A}*": [A],
    f"[{A}]": [A],
    f"<question>{A}</question>": [A],
    f"1. {A}\n2. {B}": [A, B],
    f"1) {A}\n2) {B}": [A, B],
    f"(1) {A}\n(2) {B}": [A, B],
    f"1.{A}\n2.{B}": [A, B],
    f"- {A}\n- {B}": [A, B],
    f"* {A}\n\n* {B}": [A, B],
    f"• {A}\n•{B}": [A, B],
    f"a) {A}\nb) {B}\nc) {C}": [A, B, C],
    f"A. {A}\nB. {B}": [A, B],
    f"i. {A}\nii. {B}": [A, B],
    f'1. "{A}"\n2. "{B}"': [A, B],
    f"1. **{A}** - more formal\n2. **{B}** - shorter": [A, B],
    f"Option 1: {A}\nOption 2: {B}": [A, B],
    f"{A}\n{A}\n{B}": [A, B],
    f"{A} / {B}": [A, B],
    f"{A} {B} {C}": [A, B, C],
    f"{A} or {B}": [A, B],
    f'"{A}" or "{B}"': [A, B],
    f'"{A}", "{B}"': [A, B],
    f'- "{A}",\n- "{B}",': [A, B],
    f"Sure, here are three ways to say it:\n\n1. {A}\n2. {B}\n3. {C}": [A, B, C],
    f"Sure! {A}": [A],
    f"Sure! Here's one way to ask it: {A}": [A],
    f"Of course. Here is a rephrased question:\n{A}": [A],
    f"Certainly! {A}": [A],
    f"Here are some alternatives:\n- {A}": [A],
    f"I'd be happy to help! {A}": [A],
    f"Rephrased question: {A}": [A],
    f"**Rephrased question:** {A}": [A],
    f'Rewritten: "{A}"': [A],
    f"Paraphrase 1: {A}": [A],
    f"A possible rephrasing of the question is: {A}": [A],
    f"Question: {A}": [A],
    f"Q: {A}": [A],
    f"Answer: {A}": [A],
    f"Output: {A}": [A],
    f"Assistant: {A}": [A],
    f'You could ask: "{A}"': [A],
    f'You could ask, "{A}"': [A],
    f'The question "{A}" can be rewritten as "{B}"': [A, B],
    f"Original question: {A}\nRephrased question: {B}": [B],
    f"{A}\n\nExplanation: I replaced one word.": [A],
    f"{A}\n\nI hope this helps!": [A],
    f"{A}\nLet me know if you need more.": [A],
    f"{A} (This keeps the meaning.)": [A],
    f"{A} This version uses other words.": [A],
    f"{A}\nWould you like me to rephrase it again?": [A],
    f"```\n{A}\n```": [A],
    f"```json\n{json.dumps([A, B])}\n```": [A, B],
    json.dumps([A, B]): [A, B],
    f"Here you go: {json.dumps([A, B])} Enjoy!": [A, B],
    json.dumps({"rephrased": A}): [A],
    json.dumps({"questions": [{"text": A}, {"text": B}]}): [A, B],
    f"<think>What is it? A question.</think>\n\n{A}": [A],
    "<think>What is it? I never stop": [],
    f"\u200b{A}\ufeff": [A],
    f"{A}\r\n{B}\r\n": [A, B],
    "Name the animal. (Note: shorter)": ["Name the animal."],
    'What does the sign "Stop" mean?': ['What does the sign "Stop" mean?'],
    'What does "Stop" on the sign say?': ['What does "Stop" on the sign say?'],
    "What is the man's hat?": ["What is the man's hat?"],
    "'What is the man's hat?'": ["What is the man's hat?"],
    "What is drawn: a dog or a cat?": ["What is drawn: a dog or a cat?"],
    "3 dogs or 4?": ["3 dogs or 4?"],
    "2.5 times what?": ["2.5 times what?"],
    "Could you tell me what animal it is?": ["Could you tell me what animal it is?"],
    "¿Qué animal es?": ["¿Qué animal es?"],
    "这是什么动物？": ["这是什么动物？"],
    "": [],
    " \n\n": [],
    "---": [],
    "Here are three ways:": [],
    "[": [],
    "{}": [],
}


@pytest.mark.parametrize("text", OUTPUTS)
def test_candidates(text):
    assert candidates_of(text) == OUTPUTS[text]


def test_a_refusal_is_left_to_be_told():
    text = "I'm sorry, but as an AI I cannot see images."
    assert candidates_of(text) == [text]


MARKS = st.sampled_from(["", "- ", "* ", "• ", "1. ", "2) ", "(3) ", "a) "])
QUOTES = st.sampled_from([("", ""), *PAIRS.items()])
LABELS = st.sampled_from(["", "Rephrased question: ", "Question: ", "Sure! ", "Option 2: "])
WORDS = st.lists(
    st.sampled_from("dog man two red holding the of in near a U.S. man's 3".split()), min_size=1,
    max_size=9,
).map(lambda words: f"What {' '.join(words)} is there?")  # fmt: skip
WHOLE = st.sampled_from(
    ["{}", "Sure, here you go:\n{}", "{}\n\nNote: shorter.", "```\n{}\n```", "<think>a?</think>{}"]
)


@given(st.lists(WORDS, min_size=1, max_size=4, unique=True), MARKS, QUOTES, LABELS, WHOLE)
def test_a_question_comes_out_of_whatever_is_around_it(questions, mark, quotes, label, whole):
    lines = [f"{mark}{label}{quotes[0]}{question}{quotes[1]}" for question in questions]
    assert candidates_of(whole.format("\n".join(lines))) == questions


@given(st.lists(WORDS, min_size=1, max_size=4, unique=True), st.booleans())
def test_json_of_any_shape(questions, nested):
    value = {"items": [{"text": q} for q in questions]} if nested else questions
    assert candidates_of(json.dumps(value)) == questions


@given(st.text(max_size=200))
def test_no_text_breaks_it_and_what_comes_out_is_one_clean_line(text):
    for one in candidates_of(text):
        assert one == " ".join(one.split())
        assert not has_lines(one)
        assert any(map(str.isalnum, one))


ALPHABET = st.text("ab?.!:,;-*_`'\"“”«»()[]{}<>#1 \n", max_size=80)


@given(ALPHABET)
def test_nor_does_any_punctuation(text):
    for one in candidates_of(text):
        assert one == " ".join(one.split())
        assert not has_talk(one, "another question")


@given(st.text("ab '\"“”‘’«»", max_size=30))
def test_unquoted_is_done_once(text):
    once = unquoted(text)
    assert unquoted(once) == once
    assert not (len(once) > 1 and PAIRS.get(once[0]) == once[-1] and once[-1] not in once[1:-1])
