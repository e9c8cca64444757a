"""A CLIP tokenizer with a small vocabulary, trained on the captions and a list of words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmtune.runs import write_text
from mmtune.zoo.tiny_clip.byte_pairs import learn_merges

BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path, context: int) -> None:
    """Train byte-pair merges and write the files of a stock CLIPTokenizer.

    Ids: 256 bytes, the same 256 at a word's end, merged pieces, then pad, start and end of text.
    The end of text has the highest id, so pooling at the highest id (open_clip) and at the end of
    text (transformers) choose the same place; every byte is known at every place, so no text is
    unknown.

    Args:
        texts: what the merges are learned from; order does not matter, repetition does.
        vocab_size: ids in all; above 515.
        folder: where vocab.json, merges.txt, tokenizer.json and tokenizer_config.json go.
        context: tokens that the text tower takes; longer texts are cut.

    Raises:
        ValueError: `vocab_size` leaves no room for merges.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    fixed = letters + [letter + "</w>" for letter in letters]
    if vocab_size <= len(fixed) + 3:
        raise ValueError(f"vocab_size must be above {len(fixed) + 3}, got {vocab_size}. Try 8192.")
    stock_class: Any = CLIPTokenizer
    stock = stock_class().backend_tokenizer
    words: Counter[str] = Counter()
    for text in texts:
        clean = stock.normalizer.normalize_str(text)
        words.update(word for word, _ in stock.pre_tokenizer.pre_tokenize_str(clean))
    room = vocab_size - 3
    tokens, merges = dict.fromkeys(fixed), []
    for pair in learn_merges(words, 2 * room):
        if len(tokens) == room:
            break
        merges.append(pair)
        tokens["".join(pair)] = None  # two ways to the same piece are one token
    tokens |= dict.fromkeys(f"<|unused{i}|>" for i in range(room - len(tokens)))
    vocab = {token: index for index, token in enumerate([*tokens, PAD, BOS, EOS])}
    tokenizer = stock_class(vocab=vocab, merges=merges, pad_token=PAD, model_max_length=context)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    write_text(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")
