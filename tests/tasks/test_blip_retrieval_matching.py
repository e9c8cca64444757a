"""Hard negatives, the pairs that are read together, and BLIP's parts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune.backbones import backbone_of
from mmtune.conformance.backbones import build, images_and_padded_texts
from mmtune.tasks.losses import Gathered
from mmtune.tasks.matching import Encoded, hard_negatives, matching_loss, read_together
from mmtune.tasks.momentum import Bank

HIGHEST = 1 - 2**-24  # of torch.rand


@given(data=st.data(), rows=st.integers(1, 5), columns=st.integers(1, 7))
@settings(max_examples=120, deadline=None)
def test_negatives_are_never_positives(data, rows, columns):
    def table(values):
        return data.draw(
            st.lists(
                st.lists(values, min_size=columns, max_size=columns), min_size=rows, max_size=rows
            )
        )

    scores = torch.tensor(table(st.floats(-1, 1, width=32)))
    positive = torch.tensor(table(st.booleans()))
    chance = st.sampled_from([0.0, 0.1, 0.5, 0.9, HIGHEST])
    uniform = torch.tensor(data.draw(st.lists(chance, min_size=rows, max_size=rows)))
    temperature = data.draw(st.sampled_from([0.001, 0.07, 10.0]))
    drawn, found = hard_negatives(scores, positive, uniform, temperature)
    assert torch.equal(found, ~positive.all(1))
    assert ((drawn >= 0) & (drawn < columns)).all()
    assert not positive[torch.arange(rows), drawn][found].any()


def test_negatives_are_drawn_as_often_as_the_softmax_says():
    scores = torch.tensor([0.3, 0.9, -0.2, 0.1, 0.25])
    positive = torch.tensor([False, True, False, False, False])
    count = 4000
    even = (torch.arange(count) + 0.5) / count
    drawn, _ = hard_negatives(
        scores.expand(count, -1), positive.expand(count, -1), even, temperature=0.2
    )
    chances = (scores / 0.2).masked_fill(positive, -math.inf).softmax(0)
    shares = torch.bincount(drawn, minlength=5) / count
    torch.testing.assert_close(shares, chances, rtol=0, atol=1 / count)


def test_matching_loss_leaves_negatives_out_that_are_none():
    logits = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)).double()
    found = torch.tensor([True, False, True, True, True, False])
    logs = logits.log_softmax(1)
    each = [logs[i, 1] for i in range(3)] + [logs[3 + i, 0] for i in range(6) if found[i]]
    want = -sum(each) / len(each)
    got = matching_loss(logits.float(), found, Gathered(3, torch.device("cpu")))
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


class Seen:
    """Stands for BLIP's parts: keeps what it is asked to read."""

    def fused(self, ids, mask, states):
        self.ids, self.mask, self.states = ids, mask, states
        return states[:, 0]


def test_pairs_are_read_with_the_hardest_of_the_others():
    ids = torch.tensor([[10, 0], [11, 1], [12, 2], [13, 3]])
    states = torch.arange(4.0)[:, None, None].expand(4, 3, 2)
    axes = torch.eye(5)
    # Image i is nearest to text i, then to text (i + 1) % 4; text i to image i, then (i + 2) % 4.
    image = torch.stack([axes[i] + 0.5 * axes[(i - 2) % 4] for i in range(4)])
    text = torch.stack([axes[i] + 0.9 * axes[(i - 1) % 4] for i in range(4)])
    groups = torch.arange(4)[:, None]
    pairs = Encoded(ids, ids + 100, states, Bank(image, text, groups))
    parts = Seen()
    fused, found = read_together(parts, pairs, pairs, torch.full((4, 2), 0.5), 0.01)
    assert found.all()
    assert fused.shape == (12, 2)
    similar = image @ text.T
    similar.fill_diagonal_(-1)
    hard_text, hard_image = similar.argmax(1), similar.argmax(0)
    assert torch.equal(parts.ids, torch.cat([ids, ids[hard_text], ids]))
    assert torch.equal(parts.mask, parts.ids + 100)
    want = torch.cat([torch.arange(4), torch.arange(4), hard_image]).float()
    assert torch.equal(parts.states[:, 0, 0], want)


@pytest.mark.parametrize("prepared", [False, True])
def test_parts_are_those_of_the_stock_forward(prepared):
    model = build("blip-retrieval")
    backbone = backbone_of(model)
    if prepared:
        backbone.prepare()
    batch = images_and_padded_texts(1, 4)
    pixels, ids, mask = (batch[k] for k in ("pixel_values", "input_ids", "attention_mask"))
    parts = backbone.matching(model)
    states = parts.image_states(pixels)
    assert torch.equal(parts.logits(parts.fused(ids, mask, states)), model(**batch).itm_score)
    similar = parts.image_features(states) @ parts.text_features(parts.text_states(ids, mask)).T
    assert torch.equal(similar, model(**batch, use_itm_head=False).itm_score)
    encode = ids.clone()
    encode[:, 0] = 2
    swapped = backbone.matching(model, 2)
    assert torch.equal(
        swapped.logits(swapped.fused(ids, mask, states)),
        model(**batch | {"input_ids": encode}).itm_score,
    )
    assert (ids[:, 0] == 1).all()  # the caller's tokens stay
    one = parts.fused(ids, mask, states[:1])
    many = parts.fused(ids, mask, states[:1].expand(4, -1, -1))
    torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-6)


def test_config_of_a_converted_checkpoint_names_the_token(tmp_path):
    model = build("blip-retrieval")
    model.config.match_token_id = 7
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    backbone = backbone_of(again)
    assert backbone.matching(again).first == 7
    assert backbone.matching(again, 3).first == 3


def test_conversion_names_the_token_that_begins_a_text_with_its_image():
    from mmtune.backbones.blip_checkpoints import convert
    from tests.backbones import original_blip

    model = convert(original_blip.original(original_blip.stock("retrieval")), "retrieval").model
    assert model.config.match_token_id == model.config.text_config.vocab_size - 1
    caption = convert(original_blip.original(original_blip.stock("caption")), "caption").model
    assert not hasattr(caption.config, "match_token_id")
