"""How much faster edits and their evaluation are where a batch is computed once below the edit.

    python -m mmtune.bench.editing --layers 32 --width 4096 --device cuda --out runs/bench

A LLaVA of the given size with random weights; what is measured does not depend on what they are.
An edit step is a forward and a backward pass and one step of AdamW on the region:

- naive: every weight has a gradient;
- truncated: the region's have, and autograd stops there;
- cached: `MLLM.cached`, the layers above alone;
- replayed: these as a recording that a CUDA device is sent as a whole, and the loss is read.

An evaluation scores the probes of a record before and after an edit: one by one through the whole
model, as it is published; as one batch; packed, so that the language model, too, reads once what
several prompts begin with; packed and computed once below the edit; and so that several editors
share what the unedited model says, the time being that of one of them. The same numbers come out,
which is checked. A whole evaluation also writes each answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editing.changes import Delta
from editing.methods.finetune import FineTune, FineTuneOptions
from editing.mllm import MLLM
from editing.regions import Region, parameters_of
from editing.requests import EditRecord, EditRequest
from editing.weight_edits import WeightEdit
from mmtune.bench import script
from mmtune.bench.random_llava import Size, model_of, probes_of, records_of
from mmtune.bench.timing import Timing, device_name, milliseconds, timed
from mmtune.replayed import Steps

if TYPE_CHECKING:
    from collections.abc import Iterable

    from editing.batches import Batch

REGION = Region(("language",), ("fc1", "fc2"), "last:1")
EDITORS = 5  # that share what the unedited model says


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        size: what it was found with.
        where: the device's name, and the version of torch.
        parameters: of the model.
        region: name of each parameter that is edited -> its shape.
        step: of an edit, by way.
        edit: a whole edit by fine-tuning, by way.
        evaluation: of a record, scores alone, by way.
        whole: the same with answers that are written.
        loss_difference: largest |difference| of a probe's -log p, one by one against cached, nats.
        same_choice: share of answer tokens for which the likeliest is the same.
        exact: whether packed and cached scores have the same bits.
    """

    size: Size
    where: str
    parameters: int
    region: dict[str, list[int]]
    step: dict[str, Timing]
    edit: dict[str, Timing]
    evaluation: dict[str, Timing]
    whole: dict[str, Timing]
    loss_difference: float
    same_choice: float
    exact: bool


class _Plain(MLLM):
    """Computes everything, always."""

    def cached(self, batch: Batch, names: Iterable[str]) -> Batch:
        return batch


def step_times(mllm: MLLM, request: EditRequest, size: Size) -> dict[str, Timing]:
    """One edit step, in four ways. The weights stay as they are: the learning rate is zero."""
    region = parameters_of(mllm.backbone, REGION)
    plain = mllm.batch([request])
    cached = mllm.cached(plain, region)
    cuda = mllm.device.type == "cuda"
    optimiser = torch.optim.AdamW(
        region.values(), lr=0.0, weight_decay=0.0, fused=cuda or None, capturable=cuda
    )

    def step(batch: Batch) -> None:
        mllm.nll(batch).sum().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def gradients() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        loss = mllm.nll(cached)
        loss.sum().backward()
        return loss.detach()

    def naive() -> None:
        step(plain)
        mllm.model.zero_grad(set_to_none=True)

    found = {}
    try:
        mllm.model.requires_grad_(True)
        found["naive"] = timed(naive, mllm.device, size.runs)
        mllm.model.requires_grad_(False)
        for parameter in region.values():
            parameter.requires_grad_(True)
        found["truncated"] = timed(partial(step, plain), mllm.device, size.runs)
        found["cached"] = timed(partial(step, cached), mllm.device, size.runs)
        with Steps(gradients, optimiser.step, mllm.device) as steps:

            def replayed() -> None:
                steps.gradients()
                steps.update()

            found["replayed"] = timed(replayed, mllm.device, size.runs)
    finally:
        mllm.model.requires_grad_(False)
    return found


def edit_times(mllm: MLLM, request: EditRequest, size: Size) -> dict[str, Timing]:
    """A whole edit by fine-tuning, the pass that is kept included."""
    editor = FineTune(FineTuneOptions(region=REGION, steps=size.steps, lr=1e-5))
    ways = {"plain": (_Plain, False), "cached": (MLLM, False), "replayed": (MLLM, True)}
    found = {}
    for name, (kind, replays) in ways.items():
        mllm.__class__, editor.replays = kind, replays
        run = partial(editor.edit, mllm, [request])
        found[name] = timed(run, mllm.device, 3, warm=1)
    return found


@torch.no_grad()
def evaluation_times(
    mllm: MLLM, records: Sequence[EditRecord], size: Size, written: int = 0
) -> tuple[dict[str, Timing], dict[str, list[Tensor]], list[Batch]]:
    """The time of a record and editor, in five ways, with the scores before and after each edit.

    Args:
        mllm: the model.
        records: what is asked.
        size: of what is measured.
        written: tokens that are written of each answer as well.
    """
    generator = torch.Generator(mllm.device).manual_seed(size.seed)
    region = parameters_of(mllm.backbone, REGION)

    def edit() -> WeightEdit:
        drawn = partial(torch.randn, generator=generator, device=mllm.device)
        return WeightEdit.of(mllm, {n: Delta(5e-3 * drawn(p.shape)) for n, p in region.items()})

    def ask(batches: Sequence[Batch], kept: list[Tensor]) -> None:
        for batch in batches:
            kept.append(mllm.scored_answers(batch, written)[0])

    def score(batches: Sequence[Batch], edits: Sequence[WeightEdit], kept: list[Tensor]) -> None:
        ask(batches, kept)
        for edit in edits:
            with edit.applied(mllm, strict=False):
                ask(batches, kept)

    def cached(number: int) -> list[Batch]:
        return [mllm.cached(whole[number].packed(), region)]

    edits = [edit() for _ in range(min(2, len(records)))]  # each is as good as another
    whole = [mllm.batch(probes_of(record)) for record in records]
    alone = [[mllm.batch([probe]) for probe in probes_of(record)] for record in records]
    times: dict[str, Timing] = {}
    scores: dict[str, list[Tensor]] = {}
    ways: dict[str, tuple[Callable[[int], list[Batch]], int]] = {
        "one by one": (lambda i: alone[i], 1),
        "batched": (lambda i: [whole[i]], 1),
        "packed": (lambda i: [whole[i].packed()], 1),
        "cached": (cached, 1),
        f"shared by {EDITORS} editors": (cached, EDITORS),
    }
    for way, (batches, count) in ways.items():
        for _ in range(2):  # kernels are chosen at first
            score(batches(0), edits[:1], [])
        each, scores[way] = [], []
        for i in range(len(records)):
            run = partial(score, batches(i), [edits[i % len(edits)]] * count, scores[way])
            each.append(milliseconds(run, mllm.device) / count)
        times[way] = Timing.of(each)
    return times, scores, whole


def compared(scores: Mapping[str, list[Tensor]], whole: Sequence[Batch]) -> tuple[float, float]:
    """(largest difference of -log p, share of equal choices): one by one against cached."""
    single = iter(scores["one by one"])
    worst, same, count = 0.0, 0, 0
    joint = iter(scores["cached"])
    for batch in whole:
        for _ in ("before", "after"):
            logits = next(joint)
            for row in range(len(batch)):
                own = next(single)[0]
                ids = batch.target_ids[row, : len(own)][batch.target_mask[row, : len(own)] == 1]
                a, b = (x[: len(ids)].double() for x in (own, logits[row]))
                losses = [torch.nn.functional.cross_entropy(x, ids) for x in (a, b)]
                worst = max(worst, abs(float(losses[0] - losses[1])))
                same += int((a.argmax(-1) == b.argmax(-1)).sum())
                count += len(ids)
    return worst, same / count


def measure(size: Size) -> Measured:
    """Everything, on one model."""
    mllm = model_of(size)
    records = records_of(size)
    device = mllm.device
    steps = step_times(mllm, records[0].request, size)
    edits = edit_times(mllm, records[0].request, size)
    times, scores, whole = evaluation_times(mllm, records, size)
    worst, same = compared(scores, whole)
    exact = all(map(torch.equal, scores["packed"], scores["cached"]))
    both = evaluation_times(mllm, records[: size.whole], size, size.written)[0]
    return Measured(
        size=size,
        where=f"{device_name(device)}, torch {torch.__version__}",
        parameters=sum(p.numel() for p in mllm.model.parameters()),
        region={n: list(p.shape) for n, p in parameters_of(mllm.backbone, REGION).items()},
        step=steps,
        edit=edits,
        evaluation=times,
        whole=both,
        loss_difference=worst,
        same_choice=same,
        exact=exact,
    )


def table(found: Measured) -> str:
    """Markdown: every way with its time, and how much faster it is than the first of its kind."""
    lines = [
        f"{found.parameters / 1e6:.0f}M parameters, {found.size.dtype}, {found.where}",
        "",
        "edited: " + ", ".join(f"{n} {' x '.join(map(str, s))}" for n, s in found.region.items()),
        "",
        "| what | way | ms, median [quartiles] | faster |",
        "|---|---|---|---|",
    ]
    for what, times in (
        ("edit step", found.step),
        (f"edit of {found.size.steps} steps", found.edit),
        ("scores of a record and editor", found.evaluation),
        ("scores and answers of a record and editor", found.whole),
    ):
        first = next(iter(times.values())).median
        for way, time in times.items():
            spread = str(time).removesuffix(" ms")
            lines.append(f"| {what} | {way} | {spread} | {first / time.median:.1f}x |")
    lines += [
        "",
        f"one by one against cached: -log p differs by {found.loss_difference:.2g} nats at most, "
        f"the likeliest token is the same in {found.same_choice:.1%}; packed against cached: "
        f"{'the same bits' if found.exact else 'OTHER BITS'}",
    ]
    return "\n".join(lines)


main = partial(script.main, "editing", __doc__, Size, measure, table)


if __name__ == "__main__":
    main()
