"""Sites: what each family offers, how they are chosen, and how a wrong choice is told."""

import pytest
import torch
from torch import nn

from mmtune.backbones import SiteError, backbone_of, families
from mmtune.conformance.backbones import build, images_and_texts
from mmtune.conformance.methods import PAIRWISE

EVERY = pytest.mark.parametrize("name", PAIRWISE)
ROLES = ("q", "k", "v", "out", "fc1", "fc2")


def prepared(name):
    view = backbone_of(build(name))
    view.prepare()
    return view


@EVERY
def test_every_layer_has_its_parts(name):
    view = prepared(name)
    for branch, width in (("vision", 48), ("text", 32)):
        for role in ROLES:
            sites = view.select([branch], [role])
            assert [s.layer for s in sites] == [0, 1]
            assert all(isinstance(s.module, nn.Linear) for s in sites)
            assert {s.width for s in sites} == {width}
        assert len(view.select([branch], ["embed"])) == 1
        assert len(view.select([branch], ["layer"])) == 2
        assert len(view.select([branch], ["norm"])) >= 4
    assert all(view.model.get_submodule(s.path) is s.module for s in view.sites())
    paths = [s.path for s in view.sites()]
    assert len(paths) == len(set(paths))


@EVERY
def test_prepared_computes_what_stock_computes_and_restore_is_exact(name):
    stock, model = build(name), build(name)
    view, other = backbone_of(stock), backbone_of(model)
    other.prepare()
    with torch.no_grad():
        a, b = (
            view.embed_pairs(stock, images_and_texts(0, 3)),
            other.embed_pairs(model, images_and_texts(0, 3)),
        )
        for x, y in ((a.image, b.image), (a.text, b.text)):
            assert torch.allclose(x, y, atol=1e-6)
            assert torch.allclose(x.norm(dim=-1), torch.ones(3), atol=1e-6)
        image = other.encode_image(model, images_and_texts(0, 3)["pixel_values"])
        text = other.encode_text(model, images_and_texts(0, 3)["input_ids"])
        assert torch.allclose(image, b.image, atol=1e-6)
        assert torch.allclose(text, b.text, atol=1e-6)
    assert a.scale > 1
    assert (a.bias is not None) == (name in ("siglip", "open_clip-timm"))
    other.restore()
    mine, want = model.state_dict(), stock.state_dict()
    assert list(mine) == list(want)
    assert all(torch.equal(mine[k], want[k]) for k in want)


def test_layers_are_chosen_within_each_branch():
    view = prepared("clip")
    both = ["vision", "text"]
    assert [s.layer for s in view.select(both, ["q"], "last:1")] == [1, 1]
    assert [s.layer for s in view.select(both, ["q"], [0])] == [0, 0]
    assert [s.layer for s in view.select(["text"], ["q"], [-1])] == [1]
    assert [s.layer for s in view.select(["text"], ["q"], "last:9")] == [0, 1]
    mapped = view.select(None, {"text": ["q", "v"], "vision": ["fc1"]})
    assert {(s.branch, s.role) for s in mapped} == {("text", "q"), ("text", "v"), ("vision", "fc1")}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"branches": ["visoin"]}, "it has vision, text. Did you mean 'vision'"),
        ({"branches": ["fusion"]}, "no branch 'fusion' on clip"),
        ({"roles": ["query"]}, "it has embed, norm, layer, attention, q"),
        ({"roles": ["q"], "layers": [7]}, r"no layer 7 in vision: it has layers 0\.\.1"),
        ({"roles": ["q"], "layers": "final:2"}, "'first:N', 'last:N'"),
        ({"roles": ["embed"], "layers": "last:1"}, "Use layers: all"),
        ({"roles": {"txt": ["q"]}}, "no branch 'txt'"),
    ],
)
def test_a_wrong_choice_lists_what_there_is(choice, message):
    with pytest.raises(SiteError, match=message):
        prepared("clip").select(**choice)


def test_unprepared_fused_attention_is_told():
    with pytest.raises(SiteError, match="prepare"):
        backbone_of(build("open_clip")).sites()


def test_unknown_model_lists_the_families():
    with pytest.raises(TypeError, match="open_clip") as error:
        backbone_of(nn.Linear(2, 2))
    assert all(name in str(error.value) for name in families())
