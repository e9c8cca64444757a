"""The model in training: deltas of the vision tower, the projector, a frozen language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from mmtune.zoo.llava import IMAGE_TOKEN, TURN, root_of, save_llava, start_tower

if TYPE_CHECKING:
    from mmtune.zoo.tiny_llava.recipe import LlavaRecipe


class LowRank(nn.Module):
    """weight + up @ down, zero to begin with.

    Shape:
        up [o, r]; down [r, i]; weight and result [o, i].
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


class TinyLlava(nn.Module):
    """A stock LlavaForConditionalGeneration whose tower's matrices are tuned by low-rank deltas.

    The language model computes in bfloat16 on a GPU, and is never changed.

    Attributes:
        stock: the stock model; its last hidden state of the tower is what the projector reads.
    """

    def __init__(self, recipe: LlavaRecipe, language: Any) -> None:
        super().__init__()
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        tower: Any = start_tower(recipe.start, recipe.patch_size)
        vision = tower.config
        config: Any = LlavaConfig(
            vision_config=vision.to_dict(),
            text_config=language.config.to_dict(),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=(vision.image_size // vision.patch_size) ** 2,
            vision_feature_layer=-1,
            tie_word_embeddings=language.config.tie_word_embeddings,
        )
        config.user_turn = TURN
        with torch.device("meta"):
            stock: Any = LlavaForConditionalGeneration(config)
        language.requires_grad_(False)
        stock.model.language_model, stock.lm_head = language.model, language.lm_head
        stock.model.vision_tower = tower.train()
        projector = type(stock.model.multi_modal_projector)(config)
        stock.model.multi_modal_projector = projector
        # As loud as words are, so that the language model is not startled.
        words = language.get_input_embeddings().weight.float().std().item()
        nn.init.normal_(projector.linear_2.weight, std=words / config.text_config.hidden_size**0.5)
        self.stock = stock
        self.matrices: dict[str, Any] = {
            name: module
            for name, module in root_of(tower).named_modules()
            if isinstance(module, nn.Linear)
        }
        for module in self.matrices.values():
            parametrize.register_parametrization(
                module, "weight", LowRank(module.weight, recipe.rank)
            )
            module.parametrizations.weight.original.requires_grad_(False)
        for parameter in root_of(tower).post_layernorm.parameters():
            parameter.requires_grad_(False)  # nothing reads it
        self.start = recipe.start

    @property
    def tower(self) -> Any:
        """The module with embeddings and encoder."""
        return root_of(self.stock.model.vision_tower)

    def see(self, pixels: Tensor) -> Tensor:
        """[b, 1 + tokens, d]: what the tower makes of pictures, class token first."""
        return last_state(self.stock.model.vision_tower, pixels)

    def tell(
        self, seen: Tensor, opening: Tensor, ids: Tensor, begin: Tensor, end: Tensor, kept: Tensor
    ) -> Tensor:
        """[b] -log p of each answer, the mean over its tokens and its end token, nats.

        Args:
            seen: as `see` gives it.
            opening: ids before the image.
            ids: ids behind it, with the answer.
            begin: where the answer begins in `ids`.
            end: behind its end token.
            kept: sorted ids that answers are told from.

        Shape:
            seen [b, 1 + n, d]; opening [p]; ids [b, t]; begin, end [b]; kept [k].
        """
        embed = self.stock.get_input_embeddings()
        image = self.stock.model.multi_modal_projector(seen[:, 1:])
        before = embed(opening).expand(len(ids), -1, -1)
        parts = [before, image.to(before.dtype), embed(ids[:, :-1])]
        states = self.stock.model.language_model(
            inputs_embeds=torch.cat(parts, dim=1), use_cache=False
        ).last_hidden_state
        place = torch.arange(1, ids.shape[1], device=ids.device)
        told = (place >= begin[:, None]) & (place < end[:, None])
        states = states[:, len(opening) + image.shape[1] :][told]
        head = self.stock.lm_head.weight[kept]
        losses = F.cross_entropy(
            (states @ head.T).float(),
            torch.searchsorted(kept, ids[:, 1:][told]),
            reduction="none",
        )
        sums = torch.zeros(told.shape, device=ids.device).masked_scatter(told, losses).sum(1)
        return sums / told.sum(1)

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """Write the model folder's config and weights."""
        state = dict(self.tower.named_parameters())
        deltas = {}
        for name, module in self.matrices.items():
            (delta,) = module.parametrizations.weight
            deltas[f"{name}.weight"] = (delta.up, delta.down)
        small = {
            n: p for n, p in state.items() if p.requires_grad and ".parametrizations." not in n
        }
        projector = self.stock.model.multi_modal_projector.state_dict()
        save_llava(self.stock.config, self.start, small, deltas, projector, folder)


def last_state(tower: Any, pixels: Tensor) -> Tensor:
    """[b, 1 + tokens, d]: the last layer's output, as LLaVA reads it: without the last norm."""
    return tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
