"""WISE: its losses and merging by closed forms, its shards, its router."""

from __future__ import annotations

import pytest
import torch

from editing.methods.wise import Merging, Shard
from editing.methods.wise_memory import Margins, activations, margin_loss, mask_of, ties
from editing.requests import Probe
from mmtune.data.records import DataError
from tests.editing.edit_items import item, write
from tests.editing.memories import fact, memory_editor, request, taught
from tests.editing.tiny import PROBES, drawn, picture, tiny


def test_activation_is_the_mean_over_tokens_of_the_change():
    x, delta = drawn((2, 4, 5), 0), drawn((3, 5), 1)
    tokens = torch.tensor([[False, True, True, True], [True, True, True, True]])
    want = [(x[i, tokens[i]] @ delta.T).norm(dim=-1).mean() for i in (0, 1)]
    torch.testing.assert_close(activations(x, delta, tokens), torch.stack(want))


def test_margins():
    margins = Margins(alpha=1.0, beta=4.0, gamma=2.0)
    loss = margin_loss(torch.tensor([5.0, 3.0]), torch.tensor([0.5, 2.0]), margins)
    # 2 above alpha by 1; 3 below beta by 1; 3 - 2 short of gamma by 1.
    assert float(loss) == pytest.approx(3.0)
    assert float(margin_loss(torch.tensor([5.0]), torch.tensor([1.0]), margins)) == 0.0


def test_ties():
    one, two = torch.tensor([4.0, -3.0, 0.1, 0.0]), torch.tensor([2.0, 5.0, 0.2, -6.0])
    # Trimmed: [4, -3, 0, 0] and [0, 5, 0, -6]; signs +, +, +, -; means of those that agree.
    assert ties([one, two], density=0.5).tolist() == [4.0, 5.0, 0.0, -6.0]
    # Three numbers of each are kept: 0.2 goes, 0.1 stays.
    assert ties([one, two], density=0.99).tolist() == pytest.approx([3.0, 5.0, 0.1, -6.0])
    assert ties([one], density=0.5) is one


def test_shards_become_side_memories():
    def shard(value, least):
        return Shard(torch.full((1, 2), value), 0, 1, least)

    shards = [shard(1.0, 4.0), shard(3.0, 2.0), shard(5.0, 8.0)]
    found = Merging("retrieve", 2, 0.99, 0.5).memories(shards)
    assert [(float(delta.max()), least) for delta, least in found] == [(2.0, 1.0), (5.0, 4.0)]
    (merged,) = Merging("merge", 2, 0.99, 0.5).memories(shards)
    assert merged[1] == 1.0
    assert Merging("merge", 2, 0.99, 0.5).memories([]) == []


def test_a_shard_changes_its_own_share_of_the_matrix():
    mllm = tiny("llava")
    wise = memory_editor("wise", share=0.3, steps=4)
    edit = wise.edit(mllm, [fact()])
    (shard,) = edit.shards
    mask = mask_of(shard.delta.shape, 0.3, shard.seed)
    assert not shard.delta[~mask].any()
    assert shard.delta[mask].ne(0).float().mean() > 0.9
    assert 0.25 < float(mask.float().mean()) < 0.35
    grown = wise.extend(mllm, edit, [request(30)])  # the shard is full: another opens
    assert torch.equal(grown.shards[0].delta, shard.delta)
    assert grown.shards[1].seed != 0
    assert [s.count for s in grown.shards] == [1, 1]
    filled = memory_editor("wise", share=0.3, steps=2, shard_size=3)
    once = filled.edit(mllm, [request(i) for i in range(30, 34)])
    assert [s.count for s in once.shards] == [3, 1]
    more = filled.extend(mllm, once, [request(40)])
    assert [(s.count, s.seed) for s in more.shards] == [
        (3, once.shards[0].seed),
        (2, once.shards[1].seed),
    ]


def test_no_number_leaves_its_bound():
    edit = memory_editor("wise", bound=0.01, steps=4, lr=0.1).edit(tiny("llava"), [fact()])
    assert float(edit.shards[0].delta.abs().max()) == pytest.approx(0.01)


@torch.no_grad()
def test_the_most_active_side_memory_answers():
    mllm, other = tiny("blip2-opt"), request(41)
    wise = memory_editor("wise", "blip2-opt")
    edit = wise.extend(mllm, taught("wise", "blip2-opt"), [other])
    base = mllm.answer_logits(mllm.batch(PROBES))
    with edit.applied(mllm):
        assert mllm.answer([fact(), other, *PROBES])[:2] == [fact().target, other.target]
        assert torch.equal(mllm.answer_logits(mllm.batch(PROBES)), base)


@torch.no_grad()
def test_sgd_takes_steps_along_the_gradient():
    """The first step: with no change yet, the router's norms have no gradient."""
    mllm = tiny("blip2-opt")
    edit = memory_editor("wise", optimiser="sgd", steps=1, lr=0.5).edit(mllm, [fact()])
    (shard,) = edit.shards
    name = next(iter(edit.made_on.weights))
    weight = mllm.model.get_parameter(name).clone().requires_grad_()
    with torch.enable_grad():
        mllm.nll(mllm.batch([fact()]), {name: weight}).sum().backward()
    mask = mask_of(weight.shape, 0.9, shard.seed)
    torch.testing.assert_close(shard.delta, -0.5 * weight.grad * mask, rtol=1e-4, atol=1e-6)


def test_records_say_what_is_unrelated(tmp_path):
    mllm = tiny("llava")
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        (tmp_path / name).write_bytes(picture(50 + seed).data)
    shown = {"image": "a.png", "image_rephrase": "b.png", "m_loc": "c.png"}
    file = write(tmp_path / "records.json", [item(**shown, src="w9 w8"), item(**shown)])
    plain = memory_editor("wise", "llava").edit(mllm, [fact()])
    chosen = memory_editor("wise", "llava", records=file, examples=1)
    edit = chosen.edit(mllm, [fact()])
    other = Probe("w9 w8", "w5", picture(50))
    asked = Probe(fact().question, "w5", picture(50))

    def active(edit, probe):
        (prompt,) = chosen._prompts(mllm, edit.path, [probe])
        tokens = torch.ones(1, len(prompt), dtype=torch.bool)
        (shard,) = edit.shards
        return float(activations(prompt[None], shard.delta, tokens)) / shard.least

    # Neither the records' question nor the edit's own reaches the side memory about that image.
    assert active(edit, other) < 0.88 < active(edit, fact())
    assert active(edit, asked) < active(plain, asked)
    with pytest.raises(DataError, match="nowhere"):
        memory_editor("wise", records=str(tmp_path / "nowhere.json")).edit(mllm, [fact()])
