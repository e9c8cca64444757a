"""What the three classes are worth: recall, answers, captions, each with its 95 % interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.zoo.blip import blip_tokenizer
from mmtune.zoo.tiny_blip.model import to_decoder
from mmtune.zoo.tiny_blip.objectives import next_token_loss
from mmtune.zoo.tiny_blip.questions import KINDS, read_split
from mmtune.zoo.tiny_clip.export import recalls
from mmtune.zoo.tiny_clip.material import Pictures, read_pictures, squares

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Score = dict[str, float]
BATCH = 128
RERANKED = 16  # best by ITC that ITM puts in order
RESAMPLES = 2000


def retrieval_scores(
    model: Any, folder: Path, name: str, split: str, limit: int = 0
) -> dict[str, Any]:
    """R@1, 5, 10 of a BlipForImageTextRetrieval, by ITC and put in order anew by ITM.

    By ITM: the `RERANKED` best of each query by ITC come first, ordered by the sum of their ITC
    similarity and their ITM logit (as BLIP's evaluation does).

    Args:
        model: in eval mode.
        folder: of its tokenizer.
        name: of a data set with captions.
        split: of it.
        limit: pairs used, the first ones; 0 means all.

    Returns:
        {"itc": {"txt2img R@1": {"value", "low", "high", "n"}, ...}, "itm": {...}}, in percent.
    """
    import torch
    from torch.nn import functional as F

    held = read_pictures(name, split, limit or None, model.config.vision_config.image_size)
    ids, mask = _captions(held, folder, _device(model))
    with torch.no_grad():
        states = torch.cat([_seen(model, pixels) for pixels in _batches(held.pixels, model)])
        read = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        images = F.normalize(model.vision_proj(states[:, 0]), dim=-1)
        texts = F.normalize(model.text_proj(read[:, 0]), dim=-1)
        similarity = (texts @ images.T).float()

        def matched(texts: Tensor, images: Tensor) -> Tensor:
            fused = model.text_encoder(
                input_ids=ids[texts],
                attention_mask=mask[texts],
                encoder_hidden_states=states[images],
            ).last_hidden_state
            return model.itm_head(fused[:, 0])[:, 1].float()

        txt2img = _reranked(similarity, matched)
        img2txt = _reranked(similarity.T, lambda images, texts: matched(texts, images))
    return {
        "itc": recalls(similarity.cpu(), similarity.T.cpu(), held.groups),
        "itm": recalls(txt2img.cpu(), img2txt.cpu(), held.groups),
    }


def _reranked(similarity: Tensor, matched: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Scores [q, a] in which the best answers of each query are lifted and ordered by `matched`."""
    import torch

    best = similarity.topk(min(RERANKED, similarity.shape[1]), dim=1).indices
    query = torch.arange(len(best), device=best.device).repeat_interleave(best.shape[1])
    answer = best.flatten()
    logits = torch.cat(
        [matched(q, a) for q, a in zip(query.split(BATCH), answer.split(BATCH), strict=True)]
    )
    result = similarity - 1000.0
    result[query, answer] = similarity[query, answer] + logits
    return result


def answer_scores(model: Any, folder: Path, split: str, limit: int = 0) -> dict[str, Score]:
    """Exact answers of a BlipForQuestionAnswering to easy-vqa, by the stock `generate`.

    Args:
        model: in eval mode.
        folder: of its tokenizer.
        split: of easy-vqa.
        limit: pictures used, the first ones; 0 means all.

    Returns:
        {"all" and each kind of question: {"value", "low", "high", "n"}}, in percent; the interval
        is a bootstrap over pictures, each drawn with all its questions.
    """
    import numpy as np

    rows = read_split(split, limit)
    asked = [(i, item) for i, row in enumerate(rows) for item in row["questions"]]
    given = answers_of(model, folder, rows, [(i, item["question"]) for i, item in asked])
    right = np.array([item["answer"] == a for (_, item), a in zip(asked, given, strict=True)])
    owner = np.array([i for i, _ in asked])
    kinds = np.array([item["kind"] for _, item in asked])
    chosen = {"all": np.ones(len(asked), dtype=bool)} | {kind: kinds == kind for kind in KINDS}
    return {
        name: ratio(
            np.bincount(owner[some], right[some], len(rows)),
            np.bincount(owner[some], minlength=len(rows)),
        )
        for name, some in chosen.items()
    }


def answers_of(
    model: Any, folder: Path, rows: Sequence[dict[str, Any]], asked: Sequence[tuple[int, str]]
) -> list[str]:
    """Greedy answers to questions, each with the number of its row."""
    import torch

    tokenizer = blip_tokenizer(folder)
    side, device = model.config.vision_config.image_size, _device(model)
    pixels = squares((row["image"]["bytes"] for row in rows), side)
    given: list[str] = []
    for start in range(0, len(asked), BATCH):
        some = asked[start : start + BATCH]
        texts = [text for _, text in some]
        read = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        shown = pixels[[row for row, _ in some]].to(device).float() / 127.5 - 1
        with torch.no_grad():
            out = model.generate(
                input_ids=read.input_ids,
                attention_mask=read.attention_mask,
                pixel_values=shown,
                max_new_tokens=4,
                do_sample=False,
            )
        given += [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
    return given


def caption_scores(
    model: Any, folder: Path, name: str, split: str, limit: int = 0
) -> dict[str, Score]:
    """How a BlipForConditionalGeneration captions a split, prompt-free and greedy.

    Args:
        model: in eval mode.
        folder: of its tokenizer.
        name: of a data set with captions.
        split: of it.
        limit: pairs used, the first ones; 0 means all.

    Returns:
        "loss": nats a token of the true captions; "exact" and "word F1" of greedy captions against
        the true ones, in percent; words are those of the caption without commas.
    """
    import numpy as np
    import torch

    tokenizer = blip_tokenizer(folder)
    held = read_pictures(name, split, limit or None, model.config.vision_config.image_size)
    ids, _ = _captions(held, folder, _device(model))
    ids = to_decoder(ids)
    sums, tokens, said = [], [], []
    with torch.no_grad():
        for pixels, told in zip(_batches(held.pixels, model), ids.split(BATCH), strict=True):
            mask = (told != tokenizer.pad_token_id).long()
            logits = model(pixel_values=pixels, input_ids=told, attention_mask=mask).logits
            for row, target in zip(logits, told, strict=True):
                count = int((target != tokenizer.pad_token_id).sum()) - 1
                sums.append(float(next_token_loss(row[None], target[None])) * count)
                tokens.append(count)
            out = model.generate(pixel_values=pixels, max_new_tokens=told.shape[1], do_sample=False)
            said += tokenizer.batch_decode(out, skip_special_tokens=True)
    true = [_words(row["caption"]) for row in held.rows]
    found = [_words(text) for text in said]
    both = list(zip(found, true, strict=True))
    ones = np.ones(len(both))
    return {
        "loss": ratio(np.array(sums), np.array(tokens), percent=False),
        "exact": ratio(np.array([float(a == b) for a, b in both]), ones),
        "word F1": ratio(np.array([word_f1(a, b) for a, b in both]), ones),
    }


def word_f1(found: Sequence[str], true: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, repeats counted; 0 where none is shared."""
    shared = (Counter(found) & Counter(true)).total()
    return 2 * shared / (len(found) + len(true)) if shared else 0.0


def ratio(sums: Any, counts: Any, percent: bool = True) -> Score:
    """Sum over count of n units, with a bootstrap interval over units that have any.

    Args:
        sums: [n] of each unit.
        counts: [n] what they are sums of.
        percent: times 100.
    """
    import numpy as np

    sums, counts = sums[counts > 0].astype(float), counts[counts > 0].astype(float)
    scale = 100.0 if percent else 1.0
    draw = np.random.default_rng(0)
    weights = draw.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), RESAMPLES)
    low, high = np.quantile(weights @ sums / (weights @ counts), [0.025, 0.975])
    return {
        "value": round(scale * float(sums.sum() / counts.sum()), 3),
        "low": round(scale * float(low), 3),
        "high": round(scale * float(high), 3),
        "n": int(counts.sum()),
    }


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _captions(held: Pictures, folder: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids of the captions and their mask, int64 [n, t]."""
    texts = [row["caption"] for row in held.rows]
    read = blip_tokenizer(folder)(texts, padding=True, truncation=True, return_tensors="pt")
    return read.input_ids.to(device), read.attention_mask.to(device)


def _batches(pixels: Tensor, model: Any) -> Iterator[Tensor]:
    """Pixels as the model's input, `BATCH` pictures at a time."""
    for some in pixels.split(BATCH):
        yield some.to(_device(model)).float() / 127.5 - 1


def _seen(model: Any, pixels: Tensor) -> Tensor:
    return model.vision_model(pixel_values=pixels).last_hidden_state


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
