"""A model is asked about many samples, of which some cannot be asked about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from data_builders.samples import Rejected, Sample
from editing.requests import Probe
from mmtune.data.images import load_image
from mmtune.data.records import ImageProblem

if TYPE_CHECKING:
    from data_builders.pictures import Pictures
    from data_builders.stages.base import Context
    from editing.mllm import MLLM

REFUSED = "the model cannot be asked"
Answer = Callable[[Sequence[Probe]], list[str]]
Asked = tuple[Sample, Probe]


def open_model(context: Context) -> MLLM:
    """The build's model on the device of this process."""
    from editing.loading import mllm_of

    mllm = mllm_of(replace(context.model, device="cpu"))
    mllm.model.to(context.device)
    return mllm


def ask(
    answer: Answer,
    samples: Sequence[Sample],
    questions: Sequence[str],
    pictures: Pictures,
    batch_size: int,
) -> list[str | Rejected]:
    """What the model says about each sample, or why it could not be asked: always a fault.

    An image that does not decode is found here. What is asked at once depends on the samples
    alone; one that cannot be asked does not take others with it.

    Args:
        answer: of a model.
        samples: the first target or answer of each says how long an answer may get.
        questions: one for each sample.
        pictures: where their images are.
        batch_size: questions asked at once.
    """
    found: list[str | Rejected] = []
    asked = [
        (s, Probe(q, s.target or s.answers[0], pictures.file(s.image) if s.image else None))
        for s, q in zip(samples, questions, strict=True)
    ]
    for start in range(0, len(asked), batch_size):
        found += _answers(answer, asked[start : start + batch_size])
    return found


def _answers(answer: Answer, some: Sequence[Asked]) -> list[str | Rejected]:
    if not some:
        return []
    try:
        return list(answer([probe for _, probe in some]))
    except ImageProblem:
        broken = {i: r for i, (s, p) in enumerate(some) if (r := _broken(s, p)) is not None}
        left = [one for i, one in enumerate(some) if i not in broken]
        if broken:
            said = iter(_answers(answer, left))
            return [broken[i] if i in broken else next(said) for i in range(len(some))]
        return _one_by_one(answer, some)
    except ValueError:  # such as a question that is too long for the model
        return _one_by_one(answer, some)


def _one_by_one(answer: Answer, some: Sequence[Asked]) -> list[str | Rejected]:
    found: list[str | Rejected] = []
    for sample, probe in some:
        try:
            found += answer([probe])
        except ImageProblem as error:
            found.append(Rejected(sample.id, error.reason, error.text, fault=True))
        except ValueError as error:
            found.append(Rejected(sample.id, REFUSED, str(error), fault=True))
    return found


def _broken(sample: Sample, probe: Probe) -> Rejected | None:
    try:
        if probe.image is not None:
            load_image(probe.image)
    except ImageProblem as error:
        return Rejected(sample.id, error.reason, error.text, fault=True)
    return None
