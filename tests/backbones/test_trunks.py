"""Virtual tokens among real ones: where they lie, what they see, and that they leave no trace."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmtune.backbones import backbone_of
from mmtune.backbones.trunks import insert, remove, widen
from mmtune.conformance.backbones import BACKBONES, CONTEXT, build

PLACES = st.lists(st.integers(0, 9), min_size=1, max_size=5)
LENGTH = st.integers(1, 7)


def sequence(t, at):
    """("real", i) and ("virtual", j) in the order that `insert` promises."""
    found = []
    for i in range(t + 1):
        found += [("virtual", j) for j, k in enumerate(at) if min(k, t) == i]
        found += [("real", i)] if i < t else []
    return found


@given(t=LENGTH, at=PLACES)
def test_insert_puts_each_token_before_its_place_and_remove_undoes_it(t, at):
    x = torch.randn(2, t, 3)
    tokens = torch.randn(2, len(at), 3)
    wide = insert(x, tokens, at)
    rows = {"real": x, "virtual": tokens}
    want = torch.stack([rows[kind][:, index] for kind, index in sequence(t, at)], dim=1)
    assert torch.equal(wide, want)
    assert torch.equal(remove(wide, at), x)


@given(
    t=LENGTH,
    at=PLACES,
    causal=st.booleans(),
    kind=st.sampled_from([torch.bool, torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_widened_masks_show_what_a_brute_force_shows(t, at, causal, kind, data):
    """Padding stays hidden, virtual tokens never are; causal means: nothing later."""
    padded = data.draw(st.lists(st.booleans(), min_size=t, max_size=t))
    if causal:
        padded[0] = False  # a row that sees nothing has no meaning
    lead = data.draw(st.sampled_from([(), (2,), (2, 1)]))
    visible = torch.tensor([not p for p in padded]).expand(t, t)
    visible = (visible.tril() if causal else visible).expand(*lead, t, t)
    mask = visible if kind is torch.bool else torch.zeros(visible.shape, dtype=kind)
    if kind is not torch.bool:
        hidden = data.draw(st.sampled_from([float("-inf"), torch.finfo(kind).min]))
        mask = mask.masked_fill(~visible, hidden)
    wide = widen(mask, t, at, causal)
    order = sequence(t, at)
    want = torch.tensor(
        [
            [
                (kind == "virtual" or not padded[index]) and not (causal and key > query)
                for key, (kind, index) in enumerate(order)
            ]
            for query in range(len(order))
        ]
    )
    assert wide.dtype == mask.dtype
    assert wide.shape == (*lead, t + len(at), t + len(at))
    assert torch.equal(wide if kind is torch.bool else wide == 0, want.expand(wide.shape))


@given(t=st.integers(2, 7), at=PLACES, data=st.data())
def test_a_mask_of_one_row_stays_one_row(t, at, data):
    seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=t, max_size=t)))
    wide = widen(seen.expand(3, 1, 1, t), t, at, causal=False)
    want = [kind == "virtual" or bool(seen[index]) for kind, index in sequence(t, at)]
    assert torch.equal(wide, torch.tensor(want).expand(3, 1, 1, -1))


@pytest.mark.parametrize("name", BACKBONES)
def test_trunks_are_where_they_say(name):
    view = backbone_of(build(name))
    view.prepare()
    towers = BACKBONES[name].towers
    trunks = view.trunks()
    entered = {b for b, tower in towers.items() if "q" in tower.roles and b not in view.packed}
    assert set(trunks) == entered  # virtual tokens cannot enter a branch that packs its samples
    for branch, trunk in trunks.items():
        assert trunk.branch == branch
        assert view.model.get_submodule(trunk.path) is trunk.module
        assert trunk.width == towers[branch].width


@pytest.mark.parametrize("name", ["open_clip", "open_clip-timm", "clip", "siglip"])
def test_embed_is_what_the_trunk_receives(name):
    """Text whose words start where virtual tokens would."""
    model = build(name)
    view = backbone_of(model)
    view.prepare()
    trunk = view.trunks()["text"]
    ids = BACKBONES[name].batch(0, 1)["input_ids"]
    caught = []
    trunk.module.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(args[0] if args else kwargs[trunk.hidden]),
        with_kwargs=True,
    )
    with torch.no_grad():
        view.encode_text(model, ids)
        found = trunk.embed(ids[0, trunk.start :])
    assert trunk.context == CONTEXT
    assert torch.allclose(found, caught[0][0, trunk.start :], atol=1e-6)
