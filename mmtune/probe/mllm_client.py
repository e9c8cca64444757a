"""A model of this toolkit as a client, with an edit or a fine-tune applied to it or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editing.requests import Probe
from mmtune.data.records import ImageBytes
from mmtune.probe.clients import Client, Reply, Sent

if TYPE_CHECKING:
    from editing.mllm import MLLM

NO_PICTURES = "examples were shown without their pictures: this model reads one image"


class MLLMClient(Client):
    """Asks a model of editing's MLLM protocol, greedily.

    It reads one image at most, so examples come as text alone, in front of the question.
    """

    def __init__(self, mllm: MLLM, name: str = "", batch: int = 8) -> None:
        self.mllm, self.name, self.batch = mllm, name or mllm.name, batch

    def ask(self, sent: Sequence[Sent]) -> list[Reply]:
        replies: list[Reply | None] = [None] * len(sent)
        groups: dict[int, list[int]] = {}  # one length of answers a batch
        for row, one in enumerate(sent):
            if len(one.images) > 1:
                text = f"{self.name} reads one image, and the item has {len(one.images)}"
                replies[row] = Reply("", error=text)
            else:
                groups.setdefault(one.most, []).append(row)
        for most, rows in groups.items():
            for start in range(0, len(rows), self.batch):
                some = rows[start : start + self.batch]
                for row, reply in zip(some, self._some([sent[r] for r in some], most), strict=True):
                    replies[row] = reply
        return [reply for reply in replies if reply is not None]

    def _some(self, sent: Sequence[Sent], most: int) -> list[Reply]:
        try:
            said = self.mllm.answer([_probe(one) for one in sent], max_tokens=most)
        except (TypeError, ValueError) as error:  # too long, unreadable, or no text alone
            if len(sent) > 1:
                return [reply for one in sent for reply in self._some([one], most)]
            return [Reply("", error=str(error))]
        return [
            Reply(text, note=NO_PICTURES if any(e.images for e in one.examples) else "")
            for one, text in zip(sent, said, strict=True)
        ]


def _probe(sent: Sent) -> Probe:
    parts = [f"{one.text}\n{one.answer}\n" for one in sent.examples]
    image = ImageBytes(sent.images[0]) if sent.images else None
    return Probe("\n".join([*parts, sent.text]), "", image)
