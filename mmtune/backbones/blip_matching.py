"""What BLIP computes to compare images with texts: contrastive features and match logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.functional import normalize

from mmtune.backbones.blip_generation import image_states

if TYPE_CHECKING:
    from torch import Tensor, nn


class Matching:
    """The parts of a BlipForImageTextRetrieval, each to be called by itself.

    They go past the model's forward pass; where wrappers must see one (in training), call them
    through `forward_through`.

    BLIP's code begins a text that is read with its image with [ENC] in the place of [CLS]; the
    forward pass of transformers takes the ids as they are. `first` decides.

    Args:
        model: the stock model.
        first: id that replaces the first token of a text read with its image; None leaves it.
    """

    def __init__(self, model: nn.Module, first: int | None = None) -> None:
        self.model: Any = model
        self.first = first

    def image_states(self, pixel_values: Tensor) -> Tensor:
        """[b, 3, s, s] -> [b, t, d]; of videos [b, f, 3, s, s] -> [b, f * t, d]."""
        return image_states(self.model, pixel_values)

    def text_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[b, t] -> [b, t, d], of the text alone."""
        return self.model.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state

    def image_features(self, states: Tensor) -> Tensor:
        """[b, t, d] -> [b, e], L2-normalised; of videos [b, f * t, d], the mean over f frames.

        Frames' features are normalised, averaged and normalised again. BLIP's released evaluation
        of videos averages them before they are normalised.
        """
        tokens = self.model.vision_model.embeddings.num_positions
        features = normalize(self.model.vision_proj(states[:, ::tokens]), dim=-1)
        if features.shape[1] == 1:
            return features[:, 0]
        return normalize(features.float().mean(1), dim=-1)

    def text_features(self, states: Tensor) -> Tensor:
        """[b, t, d] -> [b, e], L2-normalised."""
        return normalize(self.model.text_proj(states[:, 0]), dim=-1)

    def fused(
        self, input_ids: Tensor, attention_mask: Tensor | None, image_states: Tensor
    ) -> Tensor:
        """Class tokens of texts that are read with images, [b, d].

        Args:
            input_ids: [b, t].
            attention_mask: [b, t] or None.
            image_states: [b, s, d]; or [1, s, d], one image that all texts are read with, whose
                keys and values are then computed once.
        """
        if self.first is not None:
            input_ids = input_ids.clone()
            input_ids[:, 0] = self.first
        return self.model.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image_states,
        ).last_hidden_state[:, 0]

    def logits(self, fused: Tensor) -> Tensor:
        """[b, d] -> [b, 2]: no match, match."""
        return self.model.itm_head(fused)
