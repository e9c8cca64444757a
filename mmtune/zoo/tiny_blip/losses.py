"""Everything that one step learns from: freshly drawn pictures, texts and questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmtune.zoo.tiny_blip.model import TinyBlip, to_decoder
from mmtune.zoo.tiny_blip.objectives import hard_negatives, next_token_loss
from mmtune.zoo.tiny_blip.questions import Asked, draw_questions
from mmtune.zoo.tiny_blip.tokenizer import PAD, SPECIAL
from mmtune.zoo.tiny_clip.augmentation import augment, mix
from mmtune.zoo.tiny_clip.objectives import contrast, soft_targets, unlike
from mmtune.zoo.tiny_clip.optimisation import autocast, draw_pairs
from mmtune.zoo.tiny_clip.teachers import JointTeacher

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmtune.zoo.tiny_blip.recipe import BlipRecipe
    from mmtune.zoo.tiny_clip.material import Material


@dataclass(frozen=True)
class Objective:
    """The weighted losses of a step, by name.

    Attributes:
        recipe: the numbers.
        model: what learns.
        see: its vision tower, compiled or not.
        heads: "feature" and "sentence", used in training only, that face the teachers.
        teacher: of pictures and texts.
        data: drawings and their texts.
        asked: pictures with questions; None asks nothing.
        generator: on the data's device.
    """

    recipe: BlipRecipe
    model: TinyBlip
    see: Callable[[Tensor], Tensor]
    heads: Any
    teacher: JointTeacher
    data: Material
    asked: Asked | None
    generator: torch.Generator

    def losses(self) -> dict[str, Tensor]:
        """Draw a batch; b pairs, m mixtures, q pictures with questions."""
        import torch
        from torch.nn import functional as F

        recipe, data, device = self.recipe, self.data, self.data.groups.device
        index, choice = draw_pairs(data, recipe.batch, recipe.icon_share, self.generator)
        shown = self._views(index)
        shapes, questions = self._questions()
        with autocast(device):
            states = self.see(torch.cat([F.avg_pool2d(shown, 2), shapes]))
        drawn, shaped = states[: len(shown)], states[len(shown) :]
        found, logits = self._alignment(shown, drawn, index, choice)
        pairs = drawn[: recipe.batch]
        told = to_decoder(data.tokens[index, 0])
        if questions is not None:
            told = _stacked(told, questions["captions"])
        with autocast(device):
            found["matching"] = recipe.weight_matching * self._matching(
                pairs, data.tokens[index, choice], logits, data.groups[index]
            )
            said = self.model.tell(told, torch.cat([pairs, shaped]))
            found["caption"] = recipe.weight_caption * next_token_loss(said, told, recipe.smoothing)
            if questions is not None:
                found["answer"] = recipe.weight_answer * self._answers(shaped, questions)
        return found

    def _views(self, index: Tensor) -> Tensor:
        """Augmented drawings, then mixtures of them: [b + m, 3, 2 s, 2 s]."""
        import torch

        data, recipe = self.data, self.recipe
        double = 2 * recipe.image_size
        pixels, mirror = data.pictures.pixels[index], data.mirror[index]
        views = augment(pixels, mirror, double, self.generator)
        return torch.cat([views, mix(views, self.generator)[: recipe.mixed]])

    def _questions(self) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Pictures [q, 3, s, s], and what is asked and told about them."""
        import torch

        recipe, asked, device = self.recipe, self.asked, self.data.groups.device
        if asked is None:
            side = recipe.image_size
            return torch.zeros(0, 3, side, side, device=device), None
        index, ids, answers, weights = draw_questions(
            asked, recipe.vqa_images, recipe.vqa_asked, self.generator
        )
        mirror = torch.ones(len(index), dtype=torch.bool, device=device)
        shapes = augment(
            asked.pixels[index], mirror, recipe.image_size, self.generator, recipe.vqa_strength
        )
        captions = asked.captions[index]
        return shapes, {"ids": ids, "answers": answers, "weights": weights, "captions": captions}

    def _alignment(
        self, shown: Tensor, drawn: Tensor, index: Tensor, choice: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The contrast and what the teachers say, and the logits [b, b] of pictures with texts."""
        import torch
        from torch.nn import functional as F

        recipe, data, matching = self.recipe, self.data, self.model.matching
        device, count = data.groups.device, recipe.batch
        word = torch.randint(
            len(data.word_tokens), (count,), generator=self.generator, device=device
        )
        ids = torch.cat([data.tokens[index, choice], data.word_tokens[word]])
        sentences = torch.cat([data.sentences[index, choice], data.word_sentences[word]])
        with torch.no_grad(), autocast(device):
            seen = F.interpolate(shown, size=recipe.teacher_size, mode="bilinear")
            features = self.teacher.features(seen.contiguous(memory_format=torch.channels_last))
            teacher_images = self.teacher.pictures(features.float())
            teacher_texts = self.teacher.texts(sentences)
        with autocast(device):
            vision, language = drawn[:, 0], self.model.read(ids)[:, 0]
            images = F.normalize(matching.vision_proj(vision).float(), dim=-1)
            texts = F.normalize(matching.text_proj(language).float(), dim=-1)
            feature = self.heads["feature"](vision).float()
            sentence = self.heads["sentence"](language).float()
        targets = soft_targets(
            data.groups[index], data.sentences[index, 0], recipe.soft_share, recipe.soft_sharpness
        )
        scale = torch.tensor(1 / recipe.temperature, device=device)
        nce = contrast(images[:count], texts[:count], scale, targets)
        found = {
            "contrast": recipe.weight_contrast * nce,
            "picture": recipe.weight_picture * unlike(images, teacher_images),
            "feature": recipe.weight_feature * unlike(feature, features.float()),
            "text": recipe.weight_text * unlike(texts, teacher_texts),
            "sentence": recipe.weight_sentence * unlike(sentence, sentences),
        }
        return found, (scale * images[:count] @ texts[:count].T).detach()

    def _matching(self, pairs: Tensor, ids: Tensor, logits: Tensor, groups: Tensor) -> Tensor:
        """Whether picture and text belong together: b that do, 2 b hard ones that do not."""
        import torch
        from torch.nn import functional as F

        text = hard_negatives(logits, groups, self.generator)
        picture = hard_negatives(logits.T, groups, self.generator)
        fused = self.model.read(
            torch.cat([ids, ids[text], ids]), torch.cat([pairs, pairs, pairs[picture]])
        )
        right = torch.zeros(len(fused), dtype=torch.long, device=ids.device)
        right[: len(ids)] = 1
        return F.cross_entropy(self.model.matching.itm_head(fused[:, 0]).float(), right)

    def _answers(self, shaped: Tensor, questions: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of the answers, k questions about each of q pictures."""
        seen = shaped.repeat_interleave(self.recipe.vqa_asked, dim=0)
        states = self.model.read(questions["ids"], seen)
        said = self.model.tell(questions["answers"], states)
        return next_token_loss(said, questions["answers"], weights=questions["weights"])


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """[n, t] and [m, u] -> [n + m, t], the second padded or cut of padding."""
    import torch
    from torch.nn import functional as F

    spare = (0, first.shape[1] - second.shape[1])
    return torch.cat([first, F.pad(second, spare, value=SPECIAL.index(PAD))])
