"""`mmtune probe`: asks what is missing of a comparison, and writes what is known."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from editing.evaluation.journal import Journal
from mmtune.batched import batched
from mmtune.probe.config import LocalOptions, ProbeConfig, ReplayOptions, to_yaml
from mmtune.probe.items import Item, ItemSet
from mmtune.probe.outcomes import Outcome, outcome_of
from mmtune.probe.styles import STYLES
from mmtune.runs import RunError, manifest, write_json, write_text
from mmtune.yaml_source import as_yaml

if TYPE_CHECKING:
    from editing.mllm import MLLM
    from mmtune.probe.clients import Client, Sent
    from mmtune.probe.styles import StyleOptions

log = logging.getLogger(__name__)
CONFIG, MANIFEST, REPLIES = "config.yaml", "manifest.json", "replies.jsonl"
ITEMS = "built-in"  # the folder of the set that is made, and its name


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Attributes:
        config: of the probe.
        items: that were asked.
        outcomes: one for each model, style and item that can be asked in it.
        left_out: every style -> items that cannot be asked in it (nothing to point at, no
            examples).
    """

    config: ProbeConfig
    items: ItemSet
    outcomes: Sequence[Outcome]
    left_out: dict[str, int]

    def of(self, client: str, style: str) -> list[Outcome]:
        """The outcomes of one model in one style."""
        return [o for o in self.outcomes if o.client == client and o.style == style]


def probe(config: ProbeConfig, runs: Path, overwrite: bool = False) -> Probed:
    """Ask every model every item in every style; the same call goes on where it was stopped.

    A request that failed is asked again by the next call.

    Raises:
        RunError: the folder holds something else, or a model cannot be used.
        DataError: bad items.
    """
    root = runs / config.name
    _begin(root, config, overwrite)
    items = items_of(config, root)
    journal = Journal(root / REPLIES)
    journal.retain(lambda line: not line["error"])
    kept = [Outcome(**line) for line in journal.lines]
    unfit: set[tuple[str, str]] = set()  # (style, item) of which no request can be made
    try:
        for name in config.models:
            kept += _ask(config, name, items, kept, journal, unfit)
    except KeyboardInterrupt:
        log.warning("what is finished is kept in %s; the same command goes on with the rest", root)
        raise
    order = {pair: n for n, pair in enumerate(product(config.models, config.styles))}
    numbers = {item.id: n for n, item in enumerate(items.items)}
    kept = [o for o in kept if (o.client, o.style) in order]  # others wait in the journal
    kept.sort(key=lambda o: (order[o.client, o.style], numbers[o.item]))
    left_out = {style: sum(one == style for one, _ in unfit) for style in config.styles}
    return Probed(config, items, kept, left_out)


def items_of(config: ProbeConfig, root: Path) -> ItemSet:
    """The items of a config; the built-in set is made below the run's folder."""
    from mmtune.probe.items import read_items
    from mmtune.probe.made.writing import write
    from mmtune.probe.readers import READERS

    options = config.items
    if options.format == "made":
        file = root / ITEMS / "items.jsonl"
        found = (
            read_items(file) if file.exists() else write(root / ITEMS, options.each, config.seed)
        )
    else:
        assert options.path is not None
        found = READERS[options.format](options.path, options.images)
    return found if options.limit is None else replace(found, items=_first(found, options.limit))


def _first(items: ItemSet, limit: int) -> tuple[Item, ...]:
    seen: dict[str, int] = {}
    chosen = []
    for item in items.items:
        seen[item.category] = seen.get(item.category, 0) + 1
        if seen[item.category] <= limit:
            chosen.append(item)
    return tuple(chosen)


def _ask(
    config: ProbeConfig,
    name: str,
    items: ItemSet,
    kept: Sequence[Outcome],
    journal: Journal,
    unfit: set[tuple[str, str]],
) -> list[Outcome]:
    """Ask one model what it was not asked before; `unfit` is added to."""
    from tqdm import tqdm

    done = unfit | {(o.style, o.item) for o in kept if o.client == name}
    missing = [(s, i) for s in config.styles for i in items.items if (s, i.id) not in done]
    known, found = len(unfit), []
    requests = _requests(missing, items, config.asking, unfit)
    first = next(requests, None)
    if first is None:
        return found  # no model is loaded for nothing
    with client_of(name, config.models[name]) as client, tqdm(total=len(missing), desc=name) as bar:
        for some in batched(chain([first], requests), client.batch):
            replies = client.ask([sent for _, _, sent in some])
            for (style, item, sent), reply in zip(some, replies, strict=True):
                outcome = outcome_of(name, style, item, sent, reply)
                journal.add(outcome.as_json())
                found.append(outcome)
            bar.total = len(missing) - (len(unfit) - known)
            bar.update(len(some))
    return found


def _requests(
    missing: Iterable[tuple[str, Item]],
    items: ItemSet,
    options: StyleOptions,
    unfit: set[tuple[str, str]],
) -> Iterator[tuple[str, Item, Sent]]:
    """Requests, made as they are needed; `unfit` gets what none can be made of."""
    for style, item in missing:
        sent = STYLES[style](item, items, options)
        if sent is None:
            unfit.add((style, item.id))
        else:
            yield style, item, sent


@contextmanager
def client_of(name: str, options: Any) -> Iterator[Client]:
    """The client that options mean; an edit stays applied inside.

    Raises:
        RunError, ValueError: a model, adapter or edit that cannot be used.
    """
    from mmtune.probe.http_client import HttpClient, HttpOptions
    from mmtune.probe.mllm_client import MLLMClient
    from mmtune.probe.replay_client import ReplayClient

    if isinstance(options, HttpOptions):
        yield HttpClient(options)
    elif isinstance(options, ReplayOptions):
        yield ReplayClient(options)
    else:
        with ExitStack() as stack:
            mllm = _mllm(options)
            if options.edit is not None:
                from editing.edits import load

                stack.enter_context(load(options.edit).applied(mllm))
            yield MLLMClient(mllm, name, options.batch)


def _mllm(options: LocalOptions) -> MLLM:
    from editing.loading import mllm_of

    if options.adapter is None:
        return mllm_of(options.model)
    from mmtune import load_adapter, merge
    from mmtune.backbones import backbone_of, load

    loaded = load(options.model.name, options.model.dtype)
    stock = merge(load_adapter(loaded.model, options.adapter))
    tuned = replace(loaded, model=stock, backbone=backbone_of(stock))
    return mllm_of(options.model, tuned)


def _begin(root: Path, config: ProbeConfig, overwrite: bool) -> None:
    file, now = root / CONFIG, yaml.safe_load(to_yaml(config))
    if root.exists() and any(root.iterdir()):
        then = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        if not isinstance(then, dict) or "styles" not in then or "models" not in then:
            raise RunError(
                f"{root} exists and holds no probe, so it is left alone. Choose another name with "
                "name=NAME."
            )
        same = all(then.get(key) == now[key] for key in ("seed", "items", "asking"))
        same = same and all(
            now["models"][name] == old
            for name, old in then["models"].items()
            if name in now["models"]
        )
        if not same and not overwrite:
            raise RunError(
                f"{root} holds a probe with other items, another way of asking, or other settings "
                "of a model. Replace it with --overwrite, or use name=NAME for another folder."
            )
        if overwrite:
            shutil.rmtree(root)
        else:  # settings of models that are left out now, whose replies are in the journal
            said = {line["client"] for line in Journal(root / REPLIES).lines if not line["error"]}
            now["models"] |= {name: old for name, old in then["models"].items() if name in said}
    root.mkdir(parents=True, exist_ok=True)
    write_text(file, as_yaml(now))
    if not (root / MANIFEST).exists():
        files = [Path(config.items.path)] if config.items.path else []
        found = manifest(
            config.seed, "as each model says", [f for f in files if f.is_file()], sys.argv
        )
        write_json(root / MANIFEST, found)
