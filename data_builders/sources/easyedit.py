"""Edit records that people share (E-VQA, E-IC) as samples: to carry a finished set on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_builders.pictures import SEPARATOR, Pictures
from data_builders.samples import Keeper, Outcome, Rejected, Sample
from data_builders.sources.base import Source
from editing.datasets import FIELDS, faults_of, load_items
from mmtune.data.readers.json_files import image_root

NO_PREDICTION = "no prediction"  # in `Sample.fields`: the record has no `pred` at all


@dataclass(frozen=True)
class EasyEditOptions:
    """A file of edit records.

    Attributes:
        path: the JSON file, in the fields of `editing.datasets.FIELDS`.
        images: folder that image paths are relative to; None means the file's own.
        split: what its samples belong to.
        licence: of its images, for the data card.
    """

    path: str
    images: str | None = None
    split: str = "eval"
    licence: str = ""


class EasyEdit(Source[EasyEditOptions]):
    """Every record as a finished sample, with its texts as they stand; nothing is mended.

    Ids are the numbers in the file. Fields beyond the eleven stay with the sample.
    """

    name = "easyedit"
    options = EasyEditOptions

    def roots(self) -> Mapping[str, Path]:
        return {self.root: Path(image_root(self.settings.images, self.settings.path))}

    def files(self) -> list[str]:
        return [self.settings.path]

    def read(self, pictures: Pictures) -> Iterator[Outcome]:
        for number, item in enumerate(load_items(self.settings.path)):
            wrong = [f for f in faults_of(item) if f.reason != "nothing to edit"]
            if wrong:
                yield Rejected(
                    f"{number}", wrong[0].reason, f"{wrong[0].field}: {wrong[0].text}", True
                )
            else:
                yield self._sample(f"{number}", item)

    def _sample(self, identity: str, item: Mapping[str, Any]) -> Sample:
        rest = {name: value for name, value in item.items() if name not in FIELDS}
        rest["rephrase"] = item["rephrase"]
        return Sample(
            id=identity,
            question=item["src"],
            image=self._reference(item["image"]),
            answers=(item["alt"],),
            target=item["alt"],
            prediction=item.get("pred", ""),
            rephrase=item["rephrase"],
            image_rephrase=self._reference(item["image_rephrase"]),
            text_locality=Keeper(item["loc"], item["loc_ans"]),
            image_locality=Keeper(item["m_loc_q"], item["m_loc_a"], self._reference(item["m_loc"])),
            split=self.settings.split,
            licence=self.settings.licence,
            fields=rest if "pred" in item else rest | {NO_PREDICTION: True},
        )

    def _reference(self, name: str) -> str:
        return f"{self.root}{SEPARATOR}{name}"
