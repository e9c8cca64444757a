"""BLIP: prepared computes what stock computes, and every branch can be adapted and extended."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
import transformers
from torch import nn

from mmtune import merge
from mmtune.backbones import SiteError, backbone_of, load
from mmtune.backbones.attention import extend
from mmtune.backbones.projections import ProjectionError
from mmtune.conformance.backbones import BACKBONES, VOCABULARY, build
from mmtune.tuners import registry

from .blip_checks import BRANCHES, NAMES, close, generated, outputs, prepared

PLACES = [(name, branch) for name in NAMES for branch in BRANCHES[name]]
EVERY = pytest.mark.parametrize("name", NAMES)


@EVERY
def test_prepared_computes_what_stock_computes_and_restore_is_exact(name):
    model = build(name)
    view, inputs = backbone_of(model), BACKBONES[name].batch(0, 3)
    state, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with torch.no_grad():
        want, first = outputs(model, view, name), model(**inputs)
        view.prepare()
        assert close(outputs(model, view, name), want)
        second = model(**inputs)
        view.prepare()  # twice is once
        again = copy.deepcopy(model)
        backbone_of(again).restore()
        assert torch.equal(outputs(again, backbone_of(again), name), want)
    if name == "blip-retrieval":
        assert close(second.itm_score, first.itm_score)
    else:
        assert close(second.loss, first.loss)
    view.restore()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [type(m) for m in model.modules()] == classes
    with torch.no_grad():
        assert torch.equal(outputs(model, view, name), want)


def test_both_heads_of_retrieval_on_padded_texts():
    model = build("blip-retrieval")
    view, inputs = backbone_of(model), BACKBONES["blip-retrieval"].batch(0, 3)
    with torch.no_grad():
        contrastive = model(**inputs, use_itm_head=False).itm_score
        match = model(**inputs).itm_score
        view.prepare()
        assert close(model(**inputs, use_itm_head=False).itm_score, contrastive)
        assert close(model(**inputs).itm_score, match)
        pairs = view.embed_pairs(model, inputs)
        assert close(pairs.image @ pairs.text.T, contrastive)
        image = view.encode_image(model, inputs["pixel_values"])
        text = view.encode_text(model, inputs["input_ids"], inputs["attention_mask"])
        assert torch.equal(image, pairs.image)
        assert torch.equal(text, pairs.text)
        # Padding is unseen: the last text alone, without its padding.
        length = int(inputs["attention_mask"][2].sum())
        assert length < 10
        assert close(view.encode_text(model, inputs["input_ids"][2:, :length]), text[2:])
    assert pairs.scale.item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("name", ["blip-vqa", "blip-caption"])
def test_generation_is_that_of_the_stock_model_and_a_cache_changes_nothing(name):
    model = build(name)
    words, logits = generated(model, name)
    backbone_of(model).prepare()
    for use_cache in (True, False):
        found, mine = generated(model, name, use_cache=use_cache)
        assert torch.equal(found, words)
        assert close(mine, logits)
    beams = generated(model, name, num_beams=2)[0]
    backbone_of(model).restore()
    assert torch.equal(beams, generated(model, name, num_beams=2)[0])


def test_captions_go_on_from_prompts_that_are_padded_on_the_left():
    model = build("blip-caption")
    inputs = BACKBONES["blip-caption"].batch(0, 2)
    ids = inputs["input_ids"][:, :4]
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    call = partial(
        model.generate,
        pixel_values=inputs["pixel_values"],
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    want = call(input_ids=ids.clone())
    backbone_of(model).prepare()
    found = call(input_ids=ids.clone())
    assert torch.equal(found.sequences, want.sequences)
    assert close(torch.stack(found.logits), torch.stack(want.logits))


@EVERY
def test_sites(name):
    view = prepared(name)
    sites = view.sites()
    assert {s.branch for s in sites} == set(BRANCHES[name]) == set(BACKBONES[name].towers)
    assert len({s.path for s in sites}) == len(sites)
    assert all(view.model.get_submodule(s.path) is s.module for s in sites)
    attention = ("attention", "q", "k", "v", "out")
    cross = tuple(f"cross_{role}" for role in attention)
    layer = ("layer", "fc1", "fc2", *attention)
    in_layers = {
        "vision": (*layer, "mlp"),
        "text": layer,
        "fusion": cross,
        "language": (*layer, *cross),
    }
    for branch in BRANCHES[name]:
        tower = BACKBONES[name].towers[branch]
        here = [s for s in sites if s.branch == branch]
        counts = Counter(s.role for s in here)
        heads = 1 if branch == "language" or name == "blip-retrieval" else 0
        outside = {"norm": tower.norms, "embed": branch != "fusion", "head": heads}
        want = dict.fromkeys(in_layers[branch], tower.layers) | {
            k: n for k, n in outside.items() if n
        }
        assert counts == want
        assert {s.width for s in here} == {tower.width}
        for role, (out, into) in tower.linears().items():
            found = [s for s in here if s.role == role]
            assert [s.layer for s in found] == list(range(tower.layers))
            assert all(isinstance(s.module, nn.Linear) for s in found)
            assert all((s.module.out_features, s.module.in_features) == (out, into) for s in found)
    assert [s.layer for s in view.select(None, ["norm"], "last:1")].count(1) == len(
        [s for s in sites if s.role == "norm" and s.layer == 1]
    )


def test_unprepared_is_told_and_fusion_needs_cross_attention():
    model = build("blip-retrieval")
    with pytest.raises(SiteError, match="prepare"):
        backbone_of(model).sites()
    with pytest.raises(SiteError, match="no branch 'fusion' on blip; it has vision, language"):
        prepared("blip-caption").select(["fusion"])


@pytest.mark.parametrize("method", ["lora", "aurora"])
@pytest.mark.parametrize(("name", "branch"), PLACES)
def test_every_branch_can_be_adapted_switched_off_and_merged(name, branch, method):
    model = build(name)
    view = backbone_of(model)
    view.prepare()
    with torch.no_grad():
        base = outputs(model, view, name)
    roles = list(BACKBONES[name].towers[branch].roles)
    merging = {"gate": "off", "context": "off"} if method == "aurora" else {}
    options = registry.method(method).options(rank=2, branches=[branch], sites=roles, **merging)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = registry.apply(model, method, options).train()
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    moved = set()
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        outputs(wrapped, view, name, step).pow(3).sum().backward()
        moved |= {n for n, p in trained.items() if p.grad.abs().sum() > 0}
        optimizer.step()
    assert moved == set(trained)
    wrapped.eval()
    with torch.no_grad():
        tuned = outputs(wrapped, view, name)
        assert not close(tuned, base, 1e-4)
        with wrapped.disable_adapter():
            assert torch.equal(outputs(wrapped, view, name), base)
        stock = build(name)
        stock.load_state_dict(merge(wrapped).state_dict())
        assert close(outputs(stock, backbone_of(stock), name), tuned)


@EVERY
def test_checkpointing_changes_no_gradient(name):
    grads = []
    for enable in (False, True):
        view = prepared(name)
        view.model.train().requires_grad_(True)
        for site in view.select(None, ["embed"]):
            site.module.requires_grad_(False)
        assert view.set_gradient_checkpointing(enable)
        outputs(view.model, view, name).pow(3).sum().backward()
        grads.append({n: p.grad for n, p in view.model.named_parameters() if p.grad is not None})
    assert len(grads[0]) > 50
    assert set(grads[0]) == set(grads[1])
    assert all(close(grads[1][n], g) for n, g in grads[0].items())


def extension(site, seed=0):
    """Two random keys and values of a site's attention, [1, h, 2, e], for any batch."""
    heads = 2 if site.width == 32 else 3
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 1, heads, 2, site.width // heads, generator=g)
    return lambda keys: (k.expand(len(keys), -1, -1, -1), v.expand(len(keys), -1, -1, -1))


def by_hand(module, q, k, v, extra, mask):
    """Attention of `module` written out: softmax(q k^T / sqrt(e) + mask) v."""
    heads = extra[0].shape[1]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    k, v = torch.cat([extra[0], k], 2), torch.cat([extra[1], v], 2)
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + torch.cat([torch.zeros(*mask.shape[:-1], 2), mask], -1)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("role", ["attention", "cross_attention"])
def test_extended_text_attention_is_attention_over_more_keys(role):
    view = prepared("blip-caption")
    site = view.select(["language"], [role])[0]
    x, image = torch.randn(3, 5, 32), torch.randn(3, 4, 48)
    crossing = role == "cross_attention"
    source = image if crossing else x
    mask = torch.zeros(3, 1, 5, len(source[0]))
    mask[1, :, :, -1] = torch.finfo(torch.float32).min
    name = "encoder_attention_mask" if crossing else "attention_mask"
    kwargs = {name: mask, "encoder_hidden_states": image if crossing else None}
    m, extra = site.module, extension(site)
    with torch.no_grad():
        plain = m(x, **kwargs)[0]
        want = by_hand(m, m.query(x), m.key(source), m.value(source), extra(x), mask)
        extend(m, extra)
        assert close(m(x, **kwargs)[0], want)
        extend(m, None)
        assert torch.equal(m(x, **kwargs)[0], plain)


def test_extended_vision_attention_is_attention_over_more_keys():
    view = prepared("blip-retrieval")
    site = view.select(["vision"], ["attention"])[0]
    x, m, extra = torch.randn(3, 5, 48), site.module, extension(site)
    with torch.no_grad():
        want = m.out(by_hand(m, m.q(x), m.k(x), m.v(x), extra(x), None))
        extend(m, extra)
        assert close(m(x)[0], want)


def test_an_extension_acts_in_cached_decoding_as_without_a_cache_and_restore_removes_it():
    view = prepared("blip-caption")
    base = generated(view.model, "blip-caption")[1]
    for site in view.select(["language"], ["attention", "cross_attention"]):
        extend(site.module, extension(site))
    cached = generated(view.model, "blip-caption", use_cache=True)
    fresh = generated(view.model, "blip-caption", use_cache=False)
    assert torch.equal(cached[0], fresh[0])
    assert close(cached[1], fresh[1])
    assert not close(cached[1], base, 1e-3)
    view.restore()
    view.prepare()
    assert torch.equal(generated(view.model, "blip-caption")[1], base)


@pytest.mark.parametrize("name", ["blip-vqa", "blip-caption"])
def test_a_writer_embeds_no_pairs_and_says_which_class_does(name):
    view, batch = prepared(name), BACKBONES[name].batch(0, 3)
    for call in (
        lambda: view.embed_pairs(view.model, batch),
        lambda: view.encode_image(view.model, batch["pixel_values"]),
        lambda: view.encode_text(view.model, batch["input_ids"]),
    ):
        with pytest.raises(TypeError, match="for retrieval use BlipForImageTextRetrieval"):
            call()


def test_attention_weights_are_refused_until_restored():
    view, batch = prepared("blip-retrieval"), BACKBONES["blip-retrieval"].batch(0, 3)
    with pytest.raises(ProjectionError, match="restore the stock modules"):
        view.model(**batch, output_attentions=True)
    with pytest.raises(ProjectionError, match="BlipTextModel was asked for output_attentions"):
        view.model.text_encoder(input_ids=batch["input_ids"], output_attentions=True)
    view.restore()
    assert len(view.model(**batch, output_attentions=True).attentions) == 2


def test_dropout_of_attention_acts_in_training_only():
    config = build("blip-retrieval").config
    config.text_config.attention_probs_dropout_prob = 0.5
    config.vision_config.attention_dropout = 0.5
    model = transformers.BlipForImageTextRetrieval(config).eval()
    view = backbone_of(model)
    view.prepare()
    x, text = torch.randn(1, 5, 48), torch.randn(1, 5, 32)
    for module, states in (
        (view.select(["vision"], ["attention"])[0].module, x),
        (view.select(["text"], ["attention"])[0].module, text),
    ):
        assert torch.equal(module(states)[0], module(states)[0])
        module.train()
        assert not torch.equal(module(states)[0], module(states)[0])


def test_rows_that_see_nothing_are_as_in_the_stock_model_under_autocast():
    module = build("blip-retrieval").text_encoder.encoder.layer[0].attention.self
    x, mask = torch.randn(1, 5, 32), torch.full((1, 1, 5, 5), torch.finfo(torch.float32).min)
    view = prepared("blip-retrieval")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want = module(x, mask)[0]
        found = view.select(["text"], ["attention"])[0].module(x, mask)[0]
    assert found.dtype == torch.bfloat16
    assert close(found.float(), want.float(), 2**-7)  # two roundings


def test_loaded_by_name_with_the_class_that_the_checkpoint_names(tmp_path):
    model = build("blip-retrieval")
    model.save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]
    words += [f"word{i}" for i in range(VOCABULARY - len(words))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    transformers.BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    loaded = load(f"hf:{tmp_path}")
    assert type(loaded.model) is transformers.BlipForImageTextRetrieval
    assert (loaded.image.size, loaded.image.resize) == (32, "squash")
    tokens = loaded.tokenize(["a cat", "a"])
    assert tokens["input_ids"].tolist() == [[2, 5, 6, 3], [2, 5, 3, 0]]
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), **tokens}
    with torch.no_grad():
        want = backbone_of(model).embed_pairs(model, batch)
        assert torch.equal(loaded.backbone.embed_pairs(loaded.model, batch).text, want.text)
        random = load(f"hf:random:{tmp_path}")
        assert type(random.model) is transformers.BlipForImageTextRetrieval
        assert not torch.equal(random.backbone.embed_pairs(random.model, batch).text, want.text)
