"""How long a text a model can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def positions_of(model: Any) -> int | None:
    """How many positions its language model has; None where there is no limit."""
    return getattr(model.config.text_config, "max_position_embeddings", None)


def require_room(
    model: Any, context: Mapping[str, Tensor], target_mask: Tensor | None, name: str
) -> None:
    """Check that prompts leave room for their targets.

    Args:
        model: that reads both.
        context: of the prompts; where it holds no embeddings, targets have positions of their own.
        target_mask: [k, t]; None where nothing is read behind the prompts.
        name: of the model, for the message.

    Raises:
        ValueError: they do not.
    """
    room = positions_of(model)
    if "embeds" not in context or room is None:
        return
    # The last token is predicted and not read: it needs no position.
    after = 0 if target_mask is None else int(target_mask.sum(1).max()) - 1
    length = int(context["mask"].sum(1).max()) + after
    if length > room:
        raise ValueError(
            f"a prompt with its answer has {length} tokens and {name} reads at most {room}: "
            "shorten the question, or the text that an edit puts in front of it"
        )
