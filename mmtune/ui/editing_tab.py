"""The tab that asks a multimodal language model before and after an edit, and undoes the edit."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from mmtune.data.images import load_image
from mmtune.data.records import ImageBytes
from mmtune.ui.editing import (
    ASKED,
    REGIONS,
    Held,
    Questions,
    Undone,
    drawings,
    region_is_open,
)
from mmtune.ui.problems import EXPECTED, note, problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mmtune.data.records import MediaRef
    from mmtune.ui.editing import Desk

Answers = tuple[str, str, Held | None]  # what is said, the table, the edit that is held
KEPT = 3600  # seconds for which the edit of a page that nobody looks at is kept


def add_editing_tab(desk: Desk) -> None:
    """Add the tab to the page that is being made."""
    examples = [load_image(image) for image in drawings()]
    gr.HTML(
        f"<p>{html.escape(desk.mllm.name)} is asked before an edit, under it, and after it was "
        "undone. The new answer should hold for the picture, in whatever words it is asked; "
        "answers about another picture should stay.</p>"
    )
    held = gr.State(None, time_to_live=KEPT)
    with gr.Row():
        with gr.Column(min_width=300):
            image = _picture("The picture", "picture", examples)
        with gr.Column(min_width=300):
            other = _picture("Another picture", "other", examples)
        with gr.Column(min_width=300):
            question, target, rephrase = _texts()
            editor, region = _editors(desk)
            with gr.Row():
                ask = gr.Button("Ask", elem_id="ask", min_width=80)
                edit = gr.Button("Edit", variant="primary", elem_id="edit", min_width=80)
                undo = gr.Button("Undo", elem_id="undo", min_width=80, interactive=False)
    said = gr.HTML(elem_id="edit-said")
    answers = gr.HTML(elem_id="answers")
    asked = [image, question, rephrase, other]
    outputs = [said, answers, held, undo]

    def on(event: Any, answer: Callable[..., Answers], inputs: list[Any]) -> None:
        event(
            lambda *given: _with_undo(answer(desk, *given)),
            inputs,
            outputs,
            api_visibility="private",
            show_progress_on=[said, answers],
        )

    on(ask.click, _ask, [*asked, held])
    for event in (edit.click, target.submit):
        on(event, _edit, [*asked, held, target, editor, region])
    on(undo.click, _undo, [held])


def _texts() -> tuple[gr.Textbox, gr.Textbox, gr.Textbox]:
    question = gr.Textbox("What is this?", label="Question", elem_id="question")
    target = gr.Textbox(
        label="New answer", placeholder="such as: dragon", elem_id="target", max_lines=1
    )
    other = "What does the picture show?"
    rephrase = gr.Textbox(other, label="The question in other words", elem_id="rephrase")
    return question, target, rephrase


def _editors(desk: Desk) -> tuple[gr.Dropdown, gr.Radio]:
    """The choice of an editor, and of the part of the model that it changes."""
    first = next(iter(desk.editors))
    editor = gr.Dropdown(
        list(desk.editors), label="Editor", info=desk.editors[first].summary, elem_id="editor"
    )
    region = gr.Radio(
        REGIONS,
        value=REGIONS[0],
        label="Part of the model that is changed",
        visible=region_is_open(desk.editors[first]),
        elem_id="region",
    )

    def described(name: str) -> tuple[Any, Any]:
        chosen = desk.editors[name]
        return gr.update(info=chosen.summary), gr.update(visible=region_is_open(chosen))

    editor.change(
        described, editor, [editor, region], api_visibility="private", show_progress="hidden"
    )
    return editor, region


def _with_undo(found: Answers) -> tuple[Any, ...]:
    """The answers, and whether there is something to undo."""
    return (*found, gr.update(interactive=found[2] is not None))


def _picture(label: str, name: str, examples: Sequence[Any]) -> gr.Image:
    """A picture to upload, with drawings to choose from below it."""
    image = gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        format="png",
        sources=["upload"],
        buttons=[],
        height=230,
        elem_id=name,
    )
    choice = gr.Gallery(
        list(examples),
        show_label=False,
        columns=4,
        height="auto",
        allow_preview=False,
        interactive=False,
        buttons=[],
        object_fit="contain",
        elem_id=f"{name}-examples",
        elem_classes="choice",
    )

    def chosen(event: gr.SelectData) -> Any:
        return examples[event.index]

    choice.select(chosen, None, image, api_visibility="private", show_progress="hidden")
    return image


def _questions(image: str | None, question: str, rephrase: str, other: str | None) -> Questions:
    return Questions(question, _reference(image), rephrase, _reference(other))


def _reference(path: str | None) -> MediaRef | None:
    return None if path is None else ImageBytes(Path(path).read_bytes())


def _ask(
    desk: Desk, image: str | None, question: str, rephrase: str, other: str | None,
    held: Held | None,
) -> Answers:  # fmt: skip
    """The answers of now; with an edit that is held, of before and after it."""
    try:
        questions = _questions(image, question, rephrase, other)
        before = desk.ask(questions)
        after = None if held is None else desk.ask(questions, held.edit)
    except EXPECTED as error:
        return problem(error), "", held
    columns = {"Unedited": before} | ({} if after is None else {_under(held): after})
    return note("" if held is None else _state(held)), _table(questions, columns), held


def _edit(
    desk: Desk, image: str | None, question: str, rephrase: str, other: str | None,
    held: Held | None, target: str, editor: str, region: str,
) -> Answers:  # fmt: skip
    """Make an edit of the unedited model; one that was held before is given up for it."""
    try:
        new = desk.edit(_questions(image, question, rephrase, other), target, editor, region)
    except EXPECTED as error:
        table = "" if held is None else _table_of(held)
        return problem(error), table, held
    return note(_state(new)), _table_of(new), new


def _undo(desk: Desk, held: Held | None) -> Answers:
    if held is None:
        return note("There is no edit to undo."), "", None
    try:
        found = desk.undo(held)
    except EXPECTED as error:
        return problem(error), _table_of(held), held
    columns = {"Before": held.before, _under(held): held.after, "After undo": found.answers}
    return _undone(found), _table(held.questions, columns), None


def _undone(found: Undone) -> str:
    bits = f"all {found.count:,} numbers of the model have the bits they had before"
    if found.same_bits and found.same_answers:
        return note(f"Undone: {bits}, and the answers are those of before.")
    wrong = "its weights" if not found.same_bits else "its answers"
    return problem(f"The edit is out, but {wrong} are not those of before. Start mmtune ui again.")


def _state(held: Held) -> str:
    how = "Edited" if held.took else f"{held.editor} did not make this edit"
    return (
        f"{how}: asked “{held.questions.question.strip()}”, the model now says "
        f"“{held.after[ASKED]}”; “{held.target}” was wanted. Another edit starts from the unedited "
        "model again."
    )


def _under(held: Held | None) -> str:
    return "" if held is None else f"Under {held.editor}"


def _table_of(held: Held) -> str:
    return _table(held.questions, {"Before": held.before, _under(held): held.after})


def _table(questions: Questions, columns: Mapping[str, Mapping[str, str]]) -> str:
    """What was asked, a row each, and what was answered, a column each; changes stand out."""
    first = next(iter(columns.values()))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    rows = []
    for what, probe in questions.probes().items():
        cells = "".join(
            f"<td{' class=changed' if said[what] != first[what] else ''}>"
            f"{html.escape(said[what])}</td>"
            for said in columns.values()
        )
        asked = f"{html.escape(what)}<br><small>{html.escape(probe.question)}</small>"
        rows.append(f"<tr><th scope=row>{asked}</th>{cells}</tr>")
    return f"<table class=answers><tr><th></th>{head}</tr>{''.join(rows)}</table>"
