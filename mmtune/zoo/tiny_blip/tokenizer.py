"""A BERT tokenizer with a small vocabulary, trained on captions, questions and a list of words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmtune.zoo.tiny_clip.byte_pairs import learn_merges

PAD, UNK, CLS, SEP, MASK, DEC, ENC = SPECIAL = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[DEC]",
    "[ENC]",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_SIGNS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_INNER = 0xE000  # private characters: the letters that do not begin a word


def word_pieces(words: Mapping[str, int], count: int) -> list[str]:
    """Pieces by merging the most frequent neighbours, a piece inside a word as `##ing`.

    Args:
        words: how often each word occurs; those with other letters than a-z and 0-9 are left out.
        count: how many pieces; fewer come back where no pair is left.
    """
    known = {word: n for word, n in words.items() if word and set(word) <= set(_LETTERS)}
    inner = {word[0] + _inner(word[1:]): n for word, n in known.items()}
    found: dict[str, None] = {}
    for pair in learn_merges(inner, 2 * count, end=""):
        found.setdefault("".join(pair))
        if len(found) == count:
            break
    return [_plain(piece) for piece in found]


def _inner(letters: str) -> str:
    return "".join(chr(ord(letter) + _INNER) for letter in letters)


def _plain(piece: str) -> str:
    letters = "".join(chr(ord(c) % _INNER) for c in piece)
    return letters if ord(piece[0]) < _INNER else f"##{letters}"


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path, context: int) -> None:
    """Learn word pieces and write the files of a stock BertTokenizer.

    Ids: the `SPECIAL` tokens from 0 on, letters and signs, pieces. Texts are lowercased and lose
    their accents; a letter of another script is [UNK].

    Args:
        texts: what the pieces are learned from; order does not matter, repetition does.
        vocab_size: ids in all; above 111.
        folder: where tokenizer.json and tokenizer_config.json go.
        context: tokens a text; longer texts are cut.

    Raises:
        ValueError: `vocab_size` leaves no room for pieces.
    """
    from transformers import BertTokenizer

    fixed = [*SPECIAL, *_LETTERS, *_SIGNS, *(f"##{letter}" for letter in _LETTERS)]
    if vocab_size <= len(fixed):
        raise ValueError(f"vocab_size must be above {len(fixed)}, got {vocab_size}. Try 5120.")
    stock = BertTokenizer().backend_tokenizer
    words: Counter[str] = Counter()
    for text, times in Counter(texts).items():
        clean = stock.normalizer.normalize_str(text)
        for word, _ in stock.pre_tokenizer.pre_tokenize_str(clean):
            words[word] += times
    tokens = fixed + word_pieces(words, vocab_size - len(fixed))
    tokens += [f"[unused{i}]" for i in range(vocab_size - len(tokens))]
    tokenizer = BertTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        bos_token=DEC,
        extra_special_tokens=[ENC],
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=context,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
