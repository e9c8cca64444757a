"""The tab that finds images by text, the base model's answers beside the adapter's."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import gradio as gr

from mmtune.data.images import load_image
from mmtune.report.pictures import Pictures
from mmtune.ui.problems import EXPECTED, note, problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmtune.ui.search import Hit, ImageSearch

SHOWN, MOST = 9, 30  # pictures a side, at first and at most
EXAMPLES = 6
EDGE = 240  # pixels of a picture


def add_search_tab(search: ImageSearch, page: gr.Blocks) -> None:
    """Add the tab to the page that is being made.

    Args:
        search: what finds pictures.
        page: whose loading starts the computation of features.
    """
    gr.HTML(problem(search.problem) if search.problem else "", visible=bool(search.problem))
    with gr.Row(elem_id="asking"):
        query = gr.Textbox(
            label=f"Find among {len(search.records):,} pictures",
            placeholder="such as: a red bird",
            elem_id="query",
            scale=5,
            min_width=220,
            max_lines=3,
        )
        count = gr.Slider(
            1, MOST, SHOWN, step=1, label="Pictures", elem_id="count", scale=1, min_width=160
        )
        button = gr.Button("Search", variant="primary", elem_id="search", scale=1, min_width=110)
    gr.Examples(_examples(search), query, label="Captions of these pictures")
    said = gr.HTML(elem_id="search-said")
    with gr.Row():
        sides = []
        for number, side in enumerate(search.sides):
            with gr.Column(min_width=320):
                gr.Markdown(f"### {side.title}")
                sides.append(gr.HTML(elem_id=f"side-{number}", padding=False))

    def begin(progress: gr.Progress = gr.Progress()) -> str:  # noqa: B008 (gradio's way)
        try:
            search.embed(lambda done, of, what: progress((done, of), f"{what}: features"))
        except EXPECTED as error:
            return problem(error)
        return note(_state(search))

    def find(text: str, how_many: float, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        try:
            search.embed(lambda done, of, what: progress((done, of), f"{what}: features"))
            found = search.find(text, int(how_many))
        except EXPECTED as error:
            return [problem(error), *("" for _ in sides)]
        return [note(found.note), *map(_grid, found.sides.values())]

    page.load(begin, outputs=said, api_visibility="private")
    outputs = [said, *sides]
    asked = [query, count]
    for event in (query.submit, button.click):
        event(find, asked, outputs, api_visibility="private", show_progress_on=outputs)


def _state(search: ImageSearch) -> str:
    models = " and ".join(side.title for side in search.sides)
    left = sum(search.left_out.values())
    text = f"Features of {len(search.records):,} pictures are computed ({models})."
    if left:
        reasons = ", ".join(f"{n} {reason}" for reason, n in search.left_out.items())
        text += f" {left} could not be used: {reasons}."
    return text


def _examples(search: ImageSearch) -> list[list[str]]:
    step = max(1, len(search.records) // EXAMPLES)
    captions = [record.captions[0] for record in search.records[::step]]
    return [[caption] for caption in dict.fromkeys(captions)][:EXAMPLES]


def _grid(hits: Sequence[Hit]) -> str:
    """The pictures that were found, best first, as HTML."""
    pictures = Pictures(EDGE)
    return f'<div class="found">{"".join(_cell(hit, pictures) for hit in hits)}</div>'


def _cell(hit: Hit, pictures: Pictures) -> str:
    """A picture with what stands below it."""
    caption = html.escape(hit.record.captions[0])
    source = pictures.uri(load_image(hit.record.image))
    moved = ""
    if hit.base_rank is not None and hit.base_rank != hit.rank:
        how = "up" if hit.base_rank > hit.rank else "down"
        moved = f' <span class="{how}">base: {hit.base_rank:,}</span>'
    return (
        f'<figure><img src="{source}" alt="{caption}"><figcaption><b>{hit.rank}</b> '
        f'{hit.score:.3f}{moved}<span class="caption" title="{caption}">{caption}</span>'
        "</figcaption></figure>"
    )
