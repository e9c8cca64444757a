"""Tiny models that write text with a tokenizer of whole words."""

from __future__ import annotations

from functools import partial

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mmtune.backbones import backbone_of
from mmtune.conformance import mllms
from mmtune.conformance.backbones import BACKBONES, build

LLAVAS = ("qwen2", "mistral")
WRITERS = ("blip-vqa", "blip-caption", "blip2-opt", "blip2-t5", "llava", *LLAVAS, "minigpt4")
WORDS = [f"w{i}" for i in range(3, 59)]


def word_tokenizer(frame, special, words=WORDS):
    """Ids from 3 on are the words; `frame` stands around a text; `special` are token -> id."""
    words = {word: i for i, word in enumerate(words, start=3)}
    model = Tokenizer(models.WordLevel({**special, **words}, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    used = [(token, i) for token, i in special.items() if token in frame]
    model.post_processor = processors.TemplateProcessing(single=frame, special_tokens=used)
    model.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>")


def writer(name, prepare=True):
    """(stock model, its view, tokenizer)."""
    if name in LLAVAS:
        BACKBONES[name] = BACKBONES["llava"].__class__(
            partial(mllms.llava, name), *list(vars(BACKBONES["llava"]).values())[1:]
        )
        try:
            model = build(name)
        finally:
            del BACKBONES[name]
    else:
        model = build(name)
    view = backbone_of(model)
    if prepare:
        view.prepare()
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": 59}
    frame = {"blip-vqa": "<s> $A </s>", "blip2-t5": "$A </s>"}.get(name, "<s> $A")
    if name.startswith("blip-"):
        special = {"<pad>": 0, "<s>": 1, "<2>": 2, "</s>": 59}
    return model, view, word_tokenizer(frame, special)
