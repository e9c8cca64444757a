"""What holds for every multimodal language model."""

import tokenizers
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from mmtune.backbones import backbone_of, load
from mmtune.conformance.backbones import BACKBONES, build
from mmtune.conformance.mllms import IMAGE_TOKEN, PAD
from mmtune.tuners import registry

from .virtual import inside

CLOSE = 1e-5


def close(found, want):
    return (found - want).abs().max() <= CLOSE * want.abs().max()


def stock_and_prepared(name):
    stock, model = build(name), build(name)
    view = backbone_of(model)
    view.prepare()
    return stock, model, view


def inputs(name, seed=0, size=3):
    return BACKBONES[name].batch(seed, size)


WORDS = ("input_ids", "attention_mask", "mm_token_type_ids")  # [b, t]
IMAGES = ("pixel_values", "image_sizes", "image_grid_thw")


def padded_left(batch):
    """The same prompts with their padding before the image tokens, as `generate` wants them."""
    moved = {}
    for key in batch.keys() & WORDS:
        rows = zip(batch[key], batch["attention_mask"].sum(-1).tolist(), strict=True)
        moved[key] = torch.stack([row.roll(len(row) - length) for row, length in rows])
    return {key: batch[key] for key in batch.keys() & IMAGES} | moved


def alone(batch, row):
    """One sample of a batch padded on the right, without its padding."""
    length = int(batch["attention_mask"][row].sum())
    cut = {k: batch[k][row : row + 1, :length] for k in batch.keys() & WORDS}
    rest = {k: v[row : row + 1] for k, v in batch.items() if k not in cut}
    if "image_grid_thw" in batch:  # patches of all images stand in one row
        lengths = batch["image_grid_thw"].prod(-1).tolist()
        rest["pixel_values"] = batch["pixel_values"].split(lengths)[row]
    return rest | cut


@torch.no_grad()
def computes_what_stock_computes(name):
    stock, model, _ = stock_and_prepared(name)
    batch = inputs(name)
    want, found = stock(**batch).logits, model(**batch).logits
    assert close(found, want)
    for row in range(3):
        single = model(**alone(batch, row)).logits
        assert torch.allclose(found[row, : single.shape[1]], single[0], atol=1e-5)
    prompts = padded_left(batch)
    ids = [m.generate(**prompts, max_new_tokens=6, do_sample=False) for m in (stock, model)]
    assert torch.equal(*ids)
    # The images matter, so the vision side is part of every comparison here.
    other = batch | {"pixel_values": batch["pixel_values"].flip(0)}
    assert not close(model(**other).logits, found)


def restores_exactly(name):
    stock, model, view = stock_and_prepared(name)
    view.restore()
    mine, want = model.state_dict(), stock.state_dict()
    assert list(mine) == list(want)
    assert all(torch.equal(mine[k], want[k]) for k in want)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


def loads_by_name(name, folder, processor):
    """A saved checkpoint comes back as its own class, with a tokenizer of the LM's length."""
    model = build(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    words = {"<pad>": PAD, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 59)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    loaded = load(f"hf:{folder}")
    assert type(loaded.model) is type(model)
    batch = inputs(name)
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch).logits, model(**batch).logits)
    assert loaded.tokenize(["w5 w7", "w9"])["input_ids"].tolist() == [[5, 7], [9, PAD]]
    return loaded


def sites_are_where_they_say(view):
    sites = view.sites()
    assert all(view.model.get_submodule(s.path) is s.module for s in sites)
    assert len({s.path for s in sites}) == len(sites)
    linear = {"q", "k", "v", "out", "gate", "fc1", "fc2", "head"}
    linear |= {"cross_q", "cross_k", "cross_v", "cross_out"}
    for site in sites:
        assert (site.role in linear) == isinstance(site.module, nn.Linear)


def adapts_and_merges(name, method, branch, roles):
    """Trained on `branch` alone: outputs change, the base comes back, merged equals unmerged."""
    stock, model, view = stock_and_prepared(name)
    batch = inputs(name)
    with torch.no_grad():
        base = model(**batch).logits
    merging = {"gate": "off", "context": "off"} if method == "aurora" else {}
    options = registry.method(method).options(rank=4, branches=[branch], sites=roles, **merging)
    wrapped = registry.apply(model, method, options)
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(3):
        wrapped(**batch).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        tuned = wrapped(**batch).logits
        assert not close(tuned, base)
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(**batch).logits, base)
        merged = wrapped.merge_and_unload()
        view.restore()
        stock.load_state_dict(merged.state_dict())
        assert close(stock(**batch).logits, tuned)


@torch.no_grad()
def greedy(model, batch, steps, decoder=False):
    """Scores [b, steps, v] of greedy decoding without a cache, the whole sequence every time."""
    batch, scores = dict(batch), []
    ids, mask = ("decoder_input_ids", None) if decoder else ("input_ids", "attention_mask")
    if decoder:
        batch[ids] = torch.full((len(batch["pixel_values"]), 1), PAD)
    for _ in range(steps):
        if mask and "image_grid_thw" not in batch:  # counted from the mask, as `generate` does
            batch["position_ids"] = (batch[mask].cumsum(-1) - 1).clamp(min=0)
        scores.append(model(**batch, use_cache=False).logits[:, -1])
        words = scores[-1].index_fill(-1, torch.tensor([IMAGE_TOKEN]), float("-inf"))
        batch[ids] = torch.cat([batch[ids], words.argmax(-1, keepdim=True)], dim=1)
        if mask:
            batch[mask] = torch.cat([batch[mask], torch.ones(len(batch[mask]), 1).long()], dim=1)
        if "mm_token_type_ids" in batch:
            batch["mm_token_type_ids"] = (batch[ids] == IMAGE_TOKEN).int()
    return torch.stack(scores, dim=1)


def cached(model, batch, steps):
    """The same scores by `generate`, with its cache."""
    out = model.generate(
        **batch,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        suppress_tokens=[IMAGE_TOKEN],  # an image's place, wherever it is read again
    )
    return torch.stack(out.logits, dim=1)


def tokens(trunk, count, seed=0):
    return 0.5 * torch.randn(count, trunk.width, generator=torch.Generator().manual_seed(seed))


def spliced(x, extra, at):
    """Rows of `extra` [p, d] put into x [b, t, d] one by one: extra[j] before x[:, at[j]]."""
    rows = []
    for k in range(x.shape[1] + 1):
        rows += [
            extra[j].expand(len(x), -1) for j, place in enumerate(at) if min(place, x.shape[1]) == k
        ]
        rows += [x[:, k]] if k < x.shape[1] else []
    return torch.stack(rows, dim=1)


def kept(length, at):
    """Indices of the `length` original rows after `spliced`."""
    return [k + sum(place <= k for place in at) for k in range(length)]


@torch.no_grad()
def received(model, module, batch):
    """The keyword arguments that `module` gets in a forward pass."""
    seen = []
    handle = module.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    model(**batch)
    handle.remove()
    return seen[0]


@torch.no_grad()
def caches_virtual_tokens(name, decoder=False):
    """Cached decoding of a batch padded on the left equals decoding without a cache."""
    _, model, view = stock_and_prepared(name)
    batch = padded_left(inputs(name))
    plain = greedy(model, batch, 4, decoder)
    trunk = view.trunks()["language"]
    for at in ((0, 0, 0), (6, 6, 6), (0, 5, 99)):
        with inside(trunk, tokens(trunk, 3), at):
            want = greedy(model, batch, 4, decoder)
            assert not close(want, plain)
            found = cached(model, batch, 4)
            # "At the end" moves on with each word where nothing is cached: compare the first.
            steps = slice(1) if 99 in at and not decoder else slice(None)
            assert torch.allclose(found[:, steps], want[:, steps], atol=1e-5)
    assert torch.equal(greedy(model, batch, 4, decoder), plain)


@torch.no_grad()
def virtual_words_are_real_words(name):
    """A word's embedding as a virtual token scores as the word itself does in its place."""
    _, model, view = stock_and_prepared(name)
    trunk, batch = view.trunks()["language"], alone(inputs(name), 1)
    ids, word = batch["input_ids"], torch.tensor([17, 23])
    embedded = model.get_input_embeddings()(word)
    start = int((ids == IMAGE_TOKEN).nonzero()[:, 1].max()) + 1  # the first word behind the image
    for at in ((0, 0), (start, start), (start + 2, start + 2), (0, start + 1)):
        places = [k + j for j, k in enumerate(at)]
        longer = spliced(ids[..., None].float(), word[:, None].float(), at)[..., 0].long()
        real = {**batch, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
        if "mm_token_type_ids" in batch:
            real["mm_token_type_ids"] = (longer == IMAGE_TOKEN).int()
        want = model(**real).logits[:, kept(ids.shape[1], at)]
        assert longer[0, places].tolist() == word.tolist()
        with inside(trunk, embedded, at):
            assert close(model(**batch).logits, want)


@torch.no_grad()
def padding_does_not_reach_virtual_tokens(name):
    """A sample's scores do not depend on its batch, however it is padded."""
    _, model, view = stock_and_prepared(name)
    trunk, batch = view.trunks()["language"], inputs(name)
    with inside(trunk, tokens(trunk, 3), (0, 0, 0)):
        found = model(**batch).logits
        for row in range(3):
            single = model(**alone(batch, row)).logits
            assert torch.allclose(found[row, : single.shape[1]], single[0], atol=1e-5)
