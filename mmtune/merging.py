"""An adapter folded into stock weights, written so that the stock library loads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtune.runs import RunError, write_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.backbones.base import Backbone, Loaded
    from mmtune.config import RunConfig

TOLERANCE = 1e-5  # relative, in float32; a merged weight rounds once more than an adapter's output


def merge_run(config: RunConfig, adapter: Path, out: Path) -> float:
    """Write the stock model with the adapter folded in.

    The weights are merged in float32, whatever dtype the run used, and read back from the files
    into a stock model, whose outputs are compared with those of base plus adapter.

    Args:
        config: names the base model.
        adapter: the adapter's folder.
        out: must not exist, or be empty.

    Returns:
        The largest difference of an embedding, relative to the largest entry.

    Raises:
        RunError: `out` is taken, or the outputs differ by more than 1e-5.
        AdapterMismatchError: the adapter belongs to another backbone or rank.
    """
    from mmtune import backbones
    from mmtune.tuners.adapters import load_adapter, merge

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already; choose another folder for --out.")
    loaded = backbones.load(config.model.name)
    batch = _sample(loaded)
    model = load_adapter(loaded.model, adapter).eval()
    want = _embed(loaded.backbone, model, batch)
    merged = merge(model).eval()
    stock = backbones.load(config.model.name)
    found: list[float] = []

    def fill(folder: Path) -> None:
        _save(merged, loaded, folder)
        _read_back(stock.model, folder)
        got = _embed(stock.backbone, stock.model.eval(), batch)
        found.append(max(_relative(a, b) for a, b in zip(got, want, strict=True)))
        if not found[0] <= TOLERANCE:
            raise RunError(
                f"the merged model differs from base plus adapter by {found[0]:.1e} relative, more "
                f"than {TOLERANCE:.0e}; nothing was written to {out}."
            )

    write_folder(out, fill)
    return found[0]


def _sample(loaded: Loaded) -> dict[str, Tensor]:
    """Noise pictures and a few texts of different lengths."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size = loaded.image.size
    texts = ["a cat", "a drawing of two green apples on a table", "sun"]
    pixels = torch.randn(len(texts), 3, size, size, generator=generator)
    return {"pixel_values": pixels, **loaded.tokenize(texts)}


def _embed(backbone: Backbone, model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    import torch

    with torch.no_grad():
        pairs = backbone.embed_pairs(model, batch)
    return [pairs.image, pairs.text]


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def _save(model: Any, loaded: Loaded, folder: Path) -> None:
    """Transformers models by save_pretrained, open_clip models as open_clip's local-dir folder."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(str(folder))
        _copy_beside(loaded, folder)
        return
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    _copy_beside(loaded, folder)
    if not (folder / "open_clip_config.json").exists():
        text = json.dumps(_open_clip_config(loaded), indent=2)
        (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")


def _read_back(model: nn.Module, folder: Path) -> None:
    """Load the written weights into a stock model, every tensor of them."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    result = model.load_state_dict(state, strict=False)
    absent = [key for key in result.missing_keys if not key.endswith("position_ids")]
    if absent or result.unexpected_keys:
        raise RunError(
            f"the merged weights do not fit the stock model: missing {absent[:5]}, "
            f"unexpected {result.unexpected_keys[:5]}."
        )


def _open_clip_config(loaded: Loaded) -> dict[str, Any]:
    import open_clip

    architecture = loaded.name.removeprefix("open_clip:").partition("/")[0]
    model: Any = loaded.model
    return {
        "model_cfg": open_clip.get_model_config(architecture),
        "preprocess_cfg": open_clip.get_model_preprocess_cfg(model),
    }


def _copy_beside(loaded: Loaded, folder: Path) -> None:
    """Tokenizer and settings from the folder that the base came from, where it is a folder."""
    source = _source_folder(loaded.name)
    if source is None:
        return
    open_clip_layout = (folder / "open_clip_model.safetensors").exists()
    other = ("config.json",) if open_clip_layout else ("open_clip_config.json",)
    for path in sorted(source.iterdir()):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth")
        wanted = path.is_file() and not weights and path.name not in other
        if wanted and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _source_folder(name: str) -> Path | None:
    scheme, _, rest = name.partition(":")
    if scheme == "zoo":
        from mmtune import zoo

        return zoo.model_path(rest.partition("@")[0])
    path = Path(rest.removeprefix("random:"))
    return path if path.is_dir() else None
