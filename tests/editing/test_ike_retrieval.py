"""IKE's demonstrations, retrieval and prompts against the golden texts."""

from __future__ import annotations

import pytest
import torch

from editing.methods.ike_retrieval import (
    context,
    copy_demonstration,
    demonstrations,
    retrieve,
    shown,
)
from editing.requests import EditRecord, EditRequest, Probe

from . import golden

GOLDEN, ARRAYS = golden.settings("ike"), golden.Arrays("ike")


def record(row) -> EditRecord:
    request = EditRequest(row["prompt"], row["target"])
    return EditRecord(
        request,
        text_generality=(Probe(row["rephrase"], row["target"]),),
        text_locality=(Probe(row["loc_q"], row["loc_a"]),),
    )


POOL = demonstrations([record(row) for row in GOLDEN["records"]])
NEW = record(GOLDEN["new_edit"])


def nearest(k: int):
    return retrieve(ARRAYS["query"], ARRAYS["embeddings"], k)


def test_demonstrations():
    assert GOLDEN["demonstrations"] == POOL
    assert copy_demonstration(NEW.request) == GOLDEN["retrieval_query"]


def test_retrieval():
    found = nearest(GOLDEN["k"])
    torch.testing.assert_close(found.scores, ARRAYS["out_scores"], rtol=0, atol=1e-6)
    assert found.order == GOLDEN["top_k_order"] == ARRAYS["out_order"].tolist()
    every = nearest(GOLDEN["k_larger_than_pool"]["k"]).order
    assert every == GOLDEN["full_order"]
    assert len(every) == GOLDEN["k_larger_than_pool"]["n_returned"]
    assert every not in GOLDEN["wrong_orders"].values()
    assert nearest(0).order == []


def test_prompts_in_the_order_of_the_released_code():
    order = nearest(GOLDEN["k"]).order
    examples = shown(POOL, order, NEW.request, "reference")
    assert examples == GOLDEN["icl_examples"]
    front = context(examples, NEW.request)
    row = GOLDEN["new_edit"]
    questions = {
        "reliability": row["prompt"],
        "text_generality": row["rephrase"],
        "text_locality": row["loc_q"],
        "image_locality": row["m_loc_q"],
    }
    assert {name: front + question for name, question in questions.items()} == GOLDEN[
        "test_prompts"
    ]


def test_ours_puts_the_nearest_beside_the_question():
    order = nearest(GOLDEN["k"]).order
    ours, theirs = (shown(POOL, order, NEW.request, o) for o in ("best-last", "reference"))
    assert ours == [*reversed(theirs[:-1]), theirs[-1]]
    assert ours[-2] == POOL[GOLDEN["top_k_order"][0]]
    assert shown(POOL, [], NEW.request) == [copy_demonstration(NEW.request)]


def test_a_record_shows_what_it_has():
    request = EditRequest("Who?", "an otter")
    probes = (Probe("And who?", "an otter"), Probe("Who is it?", "an otter"))
    found = demonstrations([EditRecord(request), EditRecord(request, text_generality=probes)])
    assert found == [
        "New Fact: Who? an otter\nPrompt: Who? an otter\n\n",
        "New Fact: Who? an otter\nPrompt: Who? an otter\n\n",
        "New Fact: Who? an otter\nPrompt: And who? an otter\n\n",
    ]


def test_equal_demonstrations_keep_the_order_of_the_pool():
    pool = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 2.0], [0.0, 5.0]])
    assert retrieve(torch.tensor([0.0, 0.1]), pool, 3).order == [1, 2, 3]


def test_a_negative_k_is_refused():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        nearest(-1)
