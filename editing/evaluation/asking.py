"""Asking a model about records; what the unedited one says is computed once for all editors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, get_args

import torch

from editing.batches import probe_of
from editing.metrics.answers import AnswerTokens
from editing.metrics.definitions import Kind
from editing.requests import EditRecord, Probe

if TYPE_CHECKING:
    from torch import Tensor

    from editing.batches import Batch
    from editing.mllm import MLLM

KINDS: tuple[Kind, ...] = get_args(Kind)
LOCALITY: tuple[Kind, ...] = ("text_locality", "image_locality")
REGIONS = 2  # of which the prefix of the records at work is kept
ROOM = 2**29  # bytes of scores that are kept, in the memory of the CPU


@dataclass(frozen=True)
class Asked:
    """A probe of a record, and the kind of metric that it is for."""

    kind: Kind
    probe: Probe


@dataclass(frozen=True)
class Said:
    """What a model made of some probes.

    Attributes:
        written: its answers; None where they are known already.
        tokens: the answers' tokens with the scores from which each is predicted; None where only
            locality is compared.
        local: those of the probes of locality.
        sequences: number of a probe of locality -> [1, s, v] scores of its whole sequence, where
            they are asked for and there are any.
    """

    written: list[str] | None
    tokens: AnswerTokens | None
    local: AnswerTokens
    sequences: Mapping[int, Tensor]


def asked_of(record: EditRecord) -> list[Asked]:
    """The probes of a record: the request itself first; answers are stripped, as targets are."""
    found = [Asked("reliability", probe_of(record.request))]
    for kind in KINDS[1:]:
        for probe in getattr(record, kind):
            found.append(Asked(kind, replace(probe, answer=probe.answer.strip())))
    return found


@torch.no_grad()
def said_of(mllm: MLLM, batch: Batch, asked: Sequence[Asked], everywhere: bool) -> Said:
    """What the model makes of a batch now.

    Args:
        mllm: the model, edited or not.
        batch: the probes.
        asked: the same, with what each is for.
        everywhere: whether the scores of whole sequences are wanted.

    Raises:
        ValueError: scores that are no numbers.
    """
    logits, written = mllm.scored_answers(batch)
    tokens = AnswerTokens.of_targets(logits, batch.target_ids, batch.answer_mask)
    if bool(tokens.logits.isnan().any()):
        raise ValueError("the model's scores are no numbers (NaN): the edit broke it")
    return Said(written, tokens, _local(tokens, asked), _everywhere(mllm, asked, everywhere))


@dataclass
class Chunk:
    """Some records that are asked about together, and what is known about them.

    Attributes:
        of: whose chunk this is.
        records: what is asked.
        batches: the batch, by the parameters below which it is computed once.
        sequences: of the unedited model, once known.
    """

    of: Unedited
    records: Sequence[EditRecord]
    batches: dict[tuple[str, ...], Batch] = field(default_factory=dict)
    sequences: Mapping[int, Tensor] | None = None

    @cached_property
    def asked(self) -> list[Asked]:
        """The probes of all records, in order."""
        return [one for record in self.records for one in asked_of(record)]

    @cached_property
    def probes(self) -> list[Probe]:
        """The same without what they are for."""
        return [one.probe for one in self.asked]

    def batch(self, names: Iterable[str] = ()) -> Batch:
        """The probes, computed once below these parameters where that is of use.

        It is where several editors ask the same, or the unedited model is asked as well.
        """
        wanted = tuple(names)
        if not self.of.again and self.of.knows(self, False):
            wanted = ()
        if wanted not in self.batches:
            plain = self.batch() if wanted else self.of.mllm.batch(self.probes).packed()
            self.batches[wanted] = self.of.mllm.cached(plain, wanted) if wanted else plain
            for old in [names for names in self.batches if names][:-REGIONS]:
                del self.batches[old]  # the keys and values of a large model are large
        return self.batches[wanted]

    def answered(self) -> Said:
        """All that the unedited model says; what `untouched` gives of it is kept."""
        said = said_of(self.of.mllm, self.batch(), self.asked, self.of.everywhere)
        self.sequences = said.sequences
        self.of.keep(self, False, said.local)
        return said

    @torch.no_grad()
    def untouched(self, names: Iterable[str], hooked: bool) -> Said:
        """What the unedited model says, as far as locality is compared with it.

        Args:
            names: of parameters below which it may be computed already.
            hooked: whether it is compared with a model in which something is hooked, which reads
                each prompt in a row of its own: the unedited one then does too, so that no
                difference comes from that.
        """
        mllm, local = self.of.mllm, self.of.kept(self, hooked)
        if local is None:
            batch = self.batch(names)
            if hooked:
                batch = batch.in_rows()
                logits = mllm.answer_logits(batch)
            else:
                logits, _ = mllm.scored_answers(batch, max_tokens=0)
            tokens = AnswerTokens.of_targets(logits, batch.target_ids, batch.answer_mask)
            local = _local(tokens, self.asked)
            self.of.keep(self, hooked, local)
        if self.sequences is None:
            self.sequences = _everywhere(mllm, self.asked, self.of.everywhere)
        return Said(None, None, local, self.sequences)


class Unedited:
    """What the unedited model says about records, for all editors that are scored on them.

    Of the records at work everything is kept, of others the scores that locality is compared with,
    the latest up to a number of bytes.

    Args:
        mllm: the model, without edits whenever it is asked.
        everywhere: whether the scores of whole sequences are wanted.
        again: whether editors ask about the same records one after the other.
        room: bytes at most.
    """

    def __init__(
        self, mllm: MLLM, everywhere: bool = False, again: bool = False, room: int = ROOM
    ) -> None:
        self.mllm, self.everywhere, self.again, self.room = mllm, everywhere, again, room
        self._chunk: Chunk | None = None
        self._kept: OrderedDict[tuple[tuple[int, ...], bool], AnswerTokens] = OrderedDict()
        self._known: dict[int, EditRecord] = {}  # so that no other record gets the id of one

    def about(self, records: Sequence[EditRecord]) -> Chunk:
        """These records as what is at work now; earlier ones are let go."""
        if self._chunk is None or _ids(self._chunk) != tuple(map(id, records)):
            self._chunk = None  # what it holds may be large
            self._chunk = Chunk(self, list(records))
        return self._chunk

    def knows(self, chunk: Chunk, hooked: bool) -> bool:
        """Whether `kept` has something."""
        return (_ids(chunk), hooked) in self._kept

    def kept(self, chunk: Chunk, hooked: bool) -> AnswerTokens | None:
        """What `keep` was given, to the bit; None where it is not kept (any more)."""
        found = self._kept.get((_ids(chunk), hooked))
        return None if found is None else _on(found, self.mllm.device)

    def keep(self, chunk: Chunk, hooked: bool, local: AnswerTokens) -> None:
        """Keep the scores of a chunk's probes of locality.

        Args:
            chunk: the records.
            hooked: see `Chunk.untouched`.
            local: the scores.
        """
        self._known |= {id(record): record for record in chunk.records}
        key = _ids(chunk), hooked
        self._kept[key] = _on(local, torch.device("cpu"))
        self._kept.move_to_end(key)
        while sum(map(_bytes, self._kept.values())) > self.room:
            self._kept.popitem(last=False)


def _ids(chunk: Chunk) -> tuple[int, ...]:
    return tuple(map(id, chunk.records))


def _bytes(tokens: AnswerTokens) -> int:
    return tokens.logits.numel() * tokens.logits.element_size()


def _on(tokens: AnswerTokens, device: torch.device) -> AnswerTokens:
    return replace(
        tokens,
        logits=tokens.logits.to(device),
        ids=tokens.ids.to(device),
        rows=tokens.rows.to(device),
    )


def _local(tokens: AnswerTokens, asked: Sequence[Asked]) -> AnswerTokens:
    """The tokens of probes of locality; other answers have none."""
    wanted = [one.kind in LOCALITY for one in asked]
    chosen = torch.tensor(wanted, device=tokens.rows.device)[tokens.rows]
    return replace(
        tokens, logits=tokens.logits[chosen], ids=tokens.ids[chosen], rows=tokens.rows[chosen]
    )


def _everywhere(mllm: MLLM, asked: Sequence[Asked], wanted: bool) -> dict[int, Tensor]:
    """Number of a probe of locality -> [1, s, v], where the model has such scores now."""
    found = {}
    for number, one in enumerate(asked if wanted else ()):
        if one.kind in LOCALITY:
            try:
                own = mllm.sequences(mllm.batch([one.probe]))
            except TypeError:
                continue
            found[number] = own.logits
    return found
