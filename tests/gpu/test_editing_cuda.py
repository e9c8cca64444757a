"""Edits in bf16 on a GPU: what they do, that nothing is left of them, and that caching is exact."""

import pytest
import torch

from editing.edits import load
from editing.methods.base import editor
from editing.methods.finetune import FineTuneOptions, LoraOptions
from editing.methods.ike import IkeOptions
from tests.editing.closed_form_cases import first_logs, options, outspoken
from tests.editing.memories import fact, memory_editor
from tests.editing.prefix_cases import edit_of, place
from tests.editing.tiny import MODELS, NEWER, PROBES, REQUEST, SECOND, bits, same_bits, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EVERY = (*MODELS, *NEWER)


def on_gpu(mllm):
    mllm.model.cuda()
    return mllm


def left_alone(mllm, before, said, edit, tmp_path):
    """The bits are those of before, also after an error inside; a saved edit says the same."""
    inside = []

    def fails():
        with edit.applied(mllm):
            inside.extend(mllm.answer(PROBES))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert same_bits(mllm.model, before)
    assert mllm.answer(PROBES) == said
    edit.save(tmp_path / "edit")
    with load(tmp_path / "edit").applied(mllm):
        assert mllm.answer(PROBES) == inside
    assert same_bits(mllm.model, before)


@pytest.mark.parametrize("region", ["vision", "language"])
@pytest.mark.parametrize("kind", ["ft", "lora"])
@pytest.mark.parametrize("name", EVERY)
def test_gradient_steps_make_the_target_likelier_and_are_undone(name, kind, region, tmp_path):
    mllm = on_gpu(tiny(name, torch.bfloat16))
    before, said = bits(mllm.model), mllm.answer(PROBES)
    batch = mllm.batch([REQUEST, SECOND])
    was = mllm.nll(batch).mean()
    made = {"ft": FineTuneOptions, "lora": LoraOptions}[kind]
    edit = editor(kind, made(region=region, lr=2e-2, steps=30)).edit(mllm, [REQUEST, SECOND])
    assert same_bits(mllm.model, before)
    with edit.applied(mllm):
        assert mllm.nll(batch).mean() < was - 0.2
    left_alone(mllm, before, said, edit, tmp_path)


@pytest.mark.parametrize("kind", ["rome", "memit", "alphaedit"])
@pytest.mark.parametrize("name", ["blip2-opt", "llava", "qwen3-vl"])
def test_closed_forms_write_the_target(name, kind, tmp_path):
    mllm = on_gpu(outspoken(name, torch.bfloat16))
    before, said = bits(mllm.model), mllm.answer(PROBES)
    was = first_logs(mllm, [REQUEST])
    edit = editor(kind, options(kind, tmp_path)).edit(mllm, [REQUEST])
    with edit.applied(mllm):
        assert first_logs(mllm, [REQUEST]) > was + 1
    left_alone(mllm, before, said, edit, tmp_path)


@pytest.mark.parametrize("kind", ["grace", "wise", "liveedit"])
@pytest.mark.parametrize("name", ["llava", "blip2-opt"])
def test_memories_recall_the_fact(name, kind, tmp_path):
    mllm = on_gpu(tiny(name, torch.bfloat16))
    before, said = bits(mllm.model), mllm.answer(PROBES)
    asked = fact(name)
    settings = {"radius": 0.05} if kind == "grace" else {}
    was = mllm.nll(mllm.batch([asked]))
    edit = memory_editor(kind, name, **settings).edit(mllm, [asked])
    with edit.applied(mllm):
        assert mllm.nll(mllm.batch([asked])) < was
    left_alone(mllm, before, said, edit, tmp_path)


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_a_fact_in_the_prompt_is_undone(name, tmp_path):
    mllm = on_gpu(tiny(name, torch.bfloat16))
    before, said = bits(mllm.model), mllm.answer(PROBES)
    edit = editor("ike", IkeOptions(k=0)).edit(mllm, [REQUEST])
    left_alone(mllm, before, said, edit, tmp_path)


@pytest.mark.parametrize("where", ["last MLP", "last attention"])
@pytest.mark.parametrize("name", ["llava", "qwen2"])
def test_cached_prefixes_give_the_scores_of_the_whole_model(name, where):
    mllm = tiny(name, torch.bfloat16)
    edit = edit_of(mllm, place(mllm, where), 3)
    plain = on_gpu(mllm).batch(PROBES)
    cached = mllm.cached(plain, edit.changes)
    with edit.applied(mllm):
        assert torch.equal(mllm.answer_logits(plain), mllm.answer_logits(cached))
        assert mllm.answer(plain) == mllm.answer(cached)


@pytest.mark.parametrize("name", ["llava", "llava-onevision"])
@torch.no_grad()
def test_packed_prompts_score_and_write_as_prompts_in_rows(name):
    mllm = on_gpu(tiny(name))
    batch = mllm.batch([*PROBES, *PROBES]).packed()
    (logits, said), (rows, wanted) = (mllm.scored_answers(b, 4) for b in (batch, batch.in_rows()))
    counts = batch.target_mask.bool()
    torch.testing.assert_close(logits[counts], rows[counts], rtol=1e-3, atol=1e-3)
    assert said == wanted
    weights = place(mllm, "last MLP")
    cached = mllm.cached(batch, weights)
    for seed in (1, 2):
        with edit_of(mllm, weights, seed).applied(mllm):
            found, want = (mllm.scored_answers(b, 4) for b in (cached, batch))
        assert torch.equal(found[0], want[0])
        assert found[1] == want[1]
