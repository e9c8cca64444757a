"""What checkpoints of other codes have in common on their way into stock classes."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

SHOWN = 8  # keys that one message names
# A ViT of timm's layout -> transformers' in BLIP and BLIP-2.
VISION_NAMES = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.(.*)", r"embeddings.patch_embedding.\1"),
    (r"norm\.(.*)", r"post_layernorm.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(.*)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(.*)", r"encoder.layers.\1.self_attn.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(.*)", r"encoder.layers.\1.self_attn.projection.\2"),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.(.*)", r"encoder.layers.\1.mlp.\2.\3"),
)


class CheckpointError(ValueError):
    """A file that is no checkpoint of the code that was named, or not of the kind asked for."""


@dataclass(frozen=True)
class Converted:
    """A stock model with the weights of a checkpoint.

    Attributes:
        model: of the stock class, in eval mode.
        trained_at: image size in pixels of the checkpoint's position embeddings.
        left_out: number of tensors that have no place in the stock class, by what they are.
        replaced: names whose value gave way to that of the name they are tied to.
        temperature: the learned temperature of the contrastive loss, which transformers does not
            keep; None where the checkpoint has none.
    """

    model: nn.Module
    trained_at: int
    left_out: dict[str, int] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    temperature: float | None = None


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, by their original names.

    Raises:
        CheckpointError: the file holds code, or no tensors.
    """
    import torch

    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} is not read: it is damaged, or holds more than tensors and plain values, "
            f"which could run code ({reason}). Expected a file of torch.save."
        ) from None
    state = found["model"] if isinstance(found, Mapping) and "model" in found else found
    if not isinstance(state, Mapping) or not any(
        isinstance(v, torch.Tensor) for v in state.values()
    ):
        raise CheckpointError(
            f"{path} holds no state dict: expected a mapping of tensors, or one below 'model', got "
            f"{_described(found)}."
        )
    return {str(name): value for name, value in state.items()}


def required(used: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor by its original name; CheckpointError where there is none."""
    if name not in used:
        raise CheckpointError(f"the key {name} is missing: this is no checkpoint of that kind.")
    return used[name]


def side_of(positions: Tensor, name: str) -> int:
    """Patches along an edge, of position embeddings [1, 1 + n * n, d]."""
    side = math.isqrt(positions.shape[1] - 1)
    if side * side + 1 != positions.shape[1]:
        raise CheckpointError(
            f"{name} has {positions.shape[1]} positions; expected one and a square of patches."
        )
    return side


def interpolated(positions: Tensor, side: int) -> Tensor:
    """Position embeddings for another grid of patches, bicubic, as the original code has it.

    Args:
        positions: [1, 1 + n * n, d], that of the class token first.
        side: patches along an edge of the new grid.

    Shape: [1, 1 + side * side, d].
    """
    from torch import cat
    from torch.nn.functional import interpolate

    n = math.isqrt(positions.shape[1] - 1)
    if n == side:
        return positions
    grid = positions[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)
    grid = interpolate(grid.float(), size=(side, side), mode="bicubic", align_corners=False)
    return cat([positions[:, :1], grid.flatten(2).mT.to(positions.dtype)], dim=1)


def fill(
    model: nn.Module,
    used: Mapping[str, Tensor],
    rename: Callable[[str], str | None],
    assign: bool = False,
) -> None:
    """Load every tensor; CheckpointError names those missing, unknown, or of another shape.

    Args:
        model: of the stock class.
        used: tensors by their original names.
        rename: an original name -> the stock one.
        assign: take the tensors themselves, as a model on the meta device needs it.
    """
    want = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    mapped = {rename(name): (name, value) for name, value in used.items()}
    unknown = [n for n in used if rename(n) not in want]
    missing = [name for name in want if name not in mapped]
    wrong = [
        f"{mapped[name][0]}: {list(mapped[name][1].shape)}, expected {list(shape)}"
        for name, shape in want.items()
        if name in mapped and tuple(mapped[name][1].shape) != shape
    ]
    problems = [
        f"{len(names)} {what} key(s): {some(names)}"
        for what, names in (("unknown", unknown), ("missing", missing), ("misshapen", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit {type(model).__name__}: {'. '.join(problems)}. Missing "
            "keys are named as in transformers."
        )
    found = {str(name): value for name, (_, value) in mapped.items()}
    model.load_state_dict(found, assign=assign)


def preprocessing(size: int) -> Any:
    """The image processor of BLIP and BLIP-2."""
    from transformers import BlipImageProcessor

    make: Any = BlipImageProcessor
    return make(size={"height": size, "width": size})


def _described(found: Any) -> str:
    if isinstance(found, Mapping):
        return f"a mapping with keys {some([str(k) for k in found])}"
    return f"a {type(found).__name__}"


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more or "none"
