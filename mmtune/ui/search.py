"""Images found by text: cosines between features that are computed once a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from mmtune.batched import batched
from mmtune.data.records import ImageFile, Record
from mmtune.ui.problems import EXPECTED, PageProblem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmtune.backbones.base import Loaded

BATCH = 64  # images embedded at once
DECODERS = 4  # threads
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
Progress = Callable[[int, int, str], object]  # done, of how many, what


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Attributes:
        record: the picture, with its captions.
        score: cosine between its features and the query's.
        rank: its place, from 1.
        base_rank: its place among the base model's answers; None where this is the base model.
    """

    record: Record
    score: float
    rank: int
    base_rank: int | None = None


@dataclass(frozen=True)
class Found:
    """What a query found.

    Attributes:
        sides: title of a model -> its best pictures, the base model first.
        note: what was done to the query; empty where nothing was.
    """

    sides: dict[str, list[Hit]]
    note: str = ""


@dataclass
class Side:
    """A model that searches.

    Attributes:
        title: what the page calls it.
        loaded: the model with what feeds it.
        model: the same, or its wrapper with an adapter.
        features: [n, e] of the images, L2-normalised, in float32; None until they are computed.
    """

    title: str
    loaded: Loaded
    model: nn.Module
    features: Tensor | None = None


@dataclass
class ImageSearch:
    """A base model and, beside it, the same with an adapter, that search the same pictures.

    Attributes:
        records: the pictures.
        sides: the models, the base first.
        problem: why there is no adapter beside the base although one was asked for.
        left_out: how many pictures could not be used, by reason.
    """

    records: Sequence[Record]
    sides: list[Side]
    problem: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def ready(self) -> bool:
        """Whether all features are computed."""
        return all(side.features is not None for side in self.sides)

    def embed(self, progress: Progress = lambda done, of, what: None) -> None:
        """Compute the features of all pictures, once a model."""
        with self._lock:
            for side in self.sides:
                if side.features is None:
                    side.features = _image_features(side, self.records, progress)

    def find(self, query: str, count: int = 9) -> Found:
        """The pictures that fit a text best, for each model; ranked as evaluation ranks them.

        Args:
            query: what to look for.
            count: pictures a model.

        Raises:
            PageProblem: an empty query.
        """
        query = " ".join(query.split())
        if not query:
            raise PageProblem("Type what to look for, such as: a red bird.")
        self.embed()
        loaded = self.sides[0].loaded
        tokens, most = loaded.count_tokens(query), loaded.context_length
        cut = (
            f"The query has {tokens} tokens and the model reads {most}: what comes after them was "
            "left out."
            if tokens > most
            else ""
        )
        with self._lock:
            scores = [_scores(side, query) for side in self.sides]
        found: dict[str, list[Hit]] = {}
        for side, own in zip(self.sides, scores, strict=True):
            best = own.topk(min(count, len(self.records))).indices.tolist()
            base = None if side is self.sides[0] else scores[0]
            found[side.title] = [
                Hit(
                    self.records[i],
                    float(own[i]),
                    rank,
                    None if base is None else 1 + int((base > base[i]).sum()),
                )
                for rank, i in enumerate(best, start=1)
            ]
        return Found(found, cut)


def image_search(
    name: str,
    records: Sequence[Record],
    adapter: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    left_out: dict[str, int] | None = None,
) -> ImageSearch:
    """Load the base model and, a second time, the model that gets the adapter.

    Two models and not one whose adapter is switched off: the base is then the stock model, to the
    bit, whatever the adapter's method makes of its layers.

    Args:
        name: of the model, for `mmtune.backbones.load`.
        records: the pictures.
        adapter: folder of an adapter; one that does not fit leaves the base alone, and a `problem`.
        dtype: of the weights.
        device: where they go.
        left_out: see `ImageSearch`.

    Raises:
        ValueError: an unknown model; one that does not embed images and texts.
    """
    from mmtune import backbones
    from mmtune.tuners.adapters import adapter_method, load_adapter

    base = backbones.load(name, dtype)
    _require_towers(base)
    sides = [Side(f"Base: {name}", base, base.model.to(device))]
    why = ""
    if adapter is not None:
        try:
            other = backbones.load(name, dtype)
            model = load_adapter(other.model, adapter).to(device)
            title = f"With adapter: {adapter_method(adapter).lower()}"
            sides.append(Side(title, other, model))
        except EXPECTED as error:
            why = f"The adapter cannot be used, so the base model searches alone. {error}"
    return ImageSearch(records, sides, why, left_out or {})


def pictures_in(folder: str | Path) -> list[Record]:
    """The image files in a folder and below it, in order of name; each is captioned by its name.

    Raises:
        PageProblem: no such folder, or no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise PageProblem(f"--images: there is no folder {root}")
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.suffix.lower() in ENDINGS and path.is_file()
    )
    if not names:
        raise PageProblem(f"--images: no image in {root}; looked for {', '.join(ENDINGS)}")
    return [Record(ImageFile(str(root), name), (name,), name, str(root / name)) for name in names]


def _require_towers(loaded: Loaded) -> None:
    """PageProblem where the model does not embed texts (nor images, then)."""
    import torch

    try:
        with torch.no_grad():
            loaded.backbone.encode_text(loaded.model, **loaded.tokenize(["a"]))
    except (TypeError, AttributeError) as error:
        raise PageProblem(
            f"{loaded.name} has no features to search by: {error}. Give --model one that embeds "
            "images and texts, such as zoo:tiny-clip; one that answers questions goes to --mllm."
        ) from None


def _image_features(side: Side, records: Sequence[Record], progress: Progress) -> Tensor:
    import torch

    from mmtune.data.images import load_image
    from mmtune.data.transforms import EvalTransform
    from mmtune.tasks.base import device_of, dtype_of, evaluating

    transform = EvalTransform(side.loaded.image)
    device, dtype = device_of(side.model), dtype_of(side.loaded.model)
    found: list[Tensor] = []
    done = 0
    with evaluating(side.model), ThreadPoolExecutor(DECODERS) as pool:
        for chunk in batched(records, BATCH):
            progress(done, len(records), side.title)
            pixels = list(pool.map(lambda r: transform(load_image(r.image)), chunk))
            batch = torch.stack(pixels).to(device, dtype)
            found.append(side.loaded.backbone.encode_image(side.model, batch).float())
            done += len(chunk)
    progress(done, len(records), side.title)
    return torch.cat(found)


def _scores(side: Side, query: str) -> Tensor:
    """[n] cosines, on the CPU."""
    from mmtune.metrics.recall import Scores
    from mmtune.tasks.base import device_of, evaluating, on_device

    assert side.features is not None
    with evaluating(side.model):
        tokens = on_device(side.loaded.tokenize([query]), device_of(side.model))
        text = side.loaded.backbone.encode_text(side.model, **tokens)
        return Scores(text, side.features)[0:1][0].cpu()
