"""Replies that were kept, as a client: the same numbers again, or another way to count them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from editing.evaluation.journal import Journal
from mmtune.probe.clients import Client, Reply, Sent
from mmtune.runs import RunError

if TYPE_CHECKING:
    from mmtune.probe.config import ReplayOptions


class ReplayClient(Client):
    """Gives what was replied to the same text with the same pictures and examples."""

    batch = 64

    def __init__(self, options: ReplayOptions) -> None:
        lines = Journal(Path(options.path)).lines
        clients = sorted({line["client"] for line in lines})
        chosen = options.client or (clients[0] if len(clients) == 1 else None)
        if chosen is None or chosen not in clients:
            raise RunError(
                f"{options.path} holds replies of {', '.join(clients) or 'nobody'}: say whose by "
                f"client, got {options.client!r}"
            )
        self.name = chosen
        self._replies = {line["sent"]: line for line in lines if line["client"] == chosen}

    def ask(self, sent: Sequence[Sent]) -> list[Reply]:
        return [self._one(one) for one in sent]

    def _one(self, sent: Sent) -> Reply:
        line = self._replies.get(sent.digest())
        if line is None:
            return Reply("", error=f"this was never asked of {self.name}: {sent.text[:80]!r}")
        return Reply(line["reply"], line["error"], line["tries"], line["note"])
