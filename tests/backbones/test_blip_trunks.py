"""Virtual tokens enter and leave BLIP's branches, in cached decoding too."""

from functools import partial

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from mmtune.conformance.backbones import BACKBONES

from .blip_checks import BRANCHES, NAMES, close, generated, outputs, prepared

# What this version of transformers calls the cache that a decoder takes and gives.
FIELDS = CausalLMOutputWithCrossAttentions.__dataclass_fields__
CACHE = "cache" if "cache" in FIELDS else "past_key_values"


def prompted(trunk, tokens, at):
    """Hooks that let virtual tokens [p, d] enter and leave a trunk; returns what removes them."""
    entered = []

    def enter(module, args, kwargs):
        entered.append(trunk.entering(args, kwargs))
        if not entered[-1]:
            return trunk.carry(args, kwargs, at)
        batch = tokens.expand(trunk.batch_size(args, kwargs), -1, -1)
        return trunk.enter(args, kwargs, batch, at)

    def leave(module, args, output):
        return trunk.leave(output, at) if entered.pop() else output

    hooks = (
        trunk.module.register_forward_pre_hook(enter, with_kwargs=True),
        trunk.module.register_forward_hook(leave),
    )
    return lambda: [hook.remove() for hook in hooks]


def virtual(trunk, count=2):
    return torch.randn(count, trunk.width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_every_trunk_change_the_outputs_and_their_number_does_not_show(name):
    view = prepared(name)
    trunks = view.trunks()
    assert set(trunks) == set(BRANCHES[name]) - {"fusion"}
    with torch.no_grad():
        base = outputs(view.model, view, name)
        for trunk in trunks.values():
            assert view.model.get_submodule(trunk.path) is trunk.module
            remove = prompted(trunk, virtual(trunk), [trunk.start] * 2)
            found = outputs(view.model, view, name)
            remove()
            assert found.shape == base.shape
            assert not close(found, base, 1e-3)
        assert torch.equal(outputs(view.model, view, name), base)


@pytest.mark.parametrize("crossing", [False, True])
def test_tokens_in_a_padded_text_are_those_of_a_longer_text(crossing):
    """Against transformers' own way in for ready embeddings, whose mask is made longer."""
    view = prepared("blip-retrieval")
    tower, trunk = view.model.text_encoder, view.trunks()["text"]
    inputs = BACKBONES["blip-retrieval"].batch(0, 3)
    ids, mask, tokens = inputs["input_ids"], inputs["attention_mask"], virtual(trunk)
    image = {"encoder_hidden_states": torch.randn(3, 4, 48)} if crossing else {}
    with torch.no_grad():
        embedded = tower.embeddings(input_ids=ids)
        longer = torch.cat([embedded[:, :1], tokens.expand(3, -1, -1), embedded[:, 1:]], 1)
        seen = torch.cat([mask[:, :1], torch.ones(3, 2, dtype=torch.long), mask[:, 1:]], 1)
        want = tower(
            encoder_embeds=longer, input_ids=ids, attention_mask=seen, **image
        ).last_hidden_state
        prompted(trunk, tokens, [1, 1])
        found = tower(input_ids=ids, attention_mask=mask, **image).last_hidden_state
        assert close(found, want[:, [0, *range(3, 12)]])
        assert torch.equal(trunk.embed(ids[0, 1:]), embedded[0, 1:])


def test_virtual_tokens_see_the_image_that_the_words_see():
    trunk = prepared("blip-retrieval").trunks()["text"]
    mask = torch.zeros(2, 1, 5, 4)
    mask[1, :, :, 3] = torch.finfo(torch.float32).min
    kwargs = {"encoder_attention_mask": mask}
    (x,), found = trunk.enter((torch.randn(2, 5, 32),), kwargs, torch.randn(2, 3, 32), [1] * 3)
    wide = found["encoder_attention_mask"].expand(2, 1, x.shape[1], 4)
    assert torch.equal(wide, mask[:, :, :1].expand(2, 1, 8, 4))


def test_tokens_before_a_decoded_text_are_those_of_a_longer_text():
    view = prepared("blip-caption")
    tower, trunk = view.model.text_decoder.bert, view.trunks()["language"]
    ids, tokens = BACKBONES["blip-caption"].batch(0, 3)["input_ids"], virtual(trunk)
    image = torch.randn(3, 4, 48)
    with torch.no_grad():
        longer = torch.cat([tokens.expand(3, -1, -1), tower.embeddings(input_ids=ids)], 1)
        call = partial(tower, encoder_hidden_states=image, is_decoder=True)
        want = call(encoder_embeds=longer, input_ids=ids).last_hidden_state
        prompted(trunk, tokens, [0, 0])
        assert close(call(input_ids=ids).last_hidden_state, want[:, 2:])


@pytest.mark.parametrize("at", [[0, 0], [1, 1], [0, 2]])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_with_tokens_in_the_cache_is_decoding_without_a_cache(at, padded):
    view = prepared("blip-caption")
    decoder, trunk = view.model.text_decoder, view.trunks()["language"]
    prompted(trunk, virtual(trunk), at)
    ids = BACKBONES["blip-caption"].batch(0, 2)["input_ids"][:, :8]
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :2] = 0
    image = {"encoder_hidden_states": torch.randn(2, 4, 48)}
    with torch.no_grad():
        want = decoder(input_ids=ids, attention_mask=mask, **image).logits
        step, logits, start = None, [], 0
        for end in (4, 5, 6, 8):
            step = decoder(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                use_cache=True,
                **({} if step is None else {CACHE: step[CACHE]}),
                **image,
            )
            logits.append(step.logits)
            start = end
        real = mask.bool()
        assert close(torch.cat(logits, 1)[real], want[real])


@pytest.mark.parametrize("name", ["blip-vqa", "blip-caption"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_tokens_and_a_cache_is_generation_without_one(name, beams):
    view = prepared(name)
    base = generated(view.model, name, num_beams=beams)[1]
    for trunk in view.trunks().values():
        prompted(trunk, 3 * virtual(trunk), [trunk.start] * 2)
    cached = generated(view.model, name, num_beams=beams, use_cache=True)
    fresh = generated(view.model, name, num_beams=beams, use_cache=False)
    assert torch.equal(cached[0], fresh[0])
    assert close(cached[1], fresh[1])
    assert not close(cached[1], base, 1e-2)


def test_a_cache_without_the_tokens_is_refused():
    view = prepared("blip-caption")
    decoder, trunk = view.model.text_decoder, view.trunks()["language"]
    ids, image = torch.ones(1, 2, dtype=torch.long), torch.randn(1, 4, 48)
    before = decoder(input_ids=ids, encoder_hidden_states=image, use_cache=True)
    prompted(trunk, virtual(trunk), [0, 0])
    with pytest.raises(ValueError, match="does not know of the 2 virtual tokens"):
        decoder(input_ids=ids[:, :1], encoder_hidden_states=image, **{CACHE: before[CACHE]})
