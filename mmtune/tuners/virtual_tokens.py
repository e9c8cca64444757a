"""Virtual tokens in the trunks of a model: what prompt tuning and P-tuning share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mmtune.backbones.base import Backbone, SiteError
from mmtune.backbones.trunks import Trunk
from mmtune.tuners.sited import Attached, SitedConfig, SitedTuner


class TrunkTokens(Attached):
    """The virtual tokens of one branch, and the hooks through which they enter and leave its trunk.

    Parameters of an adapter: mmtune_tokens[adapter] [p, d].

    Attributes:
        trunk: where they enter.
        at: adapter -> index in the original sequence before which each of its tokens enters.
        ensemble: adapters that share a batch; see `ensembled` in mmtune.tuners.prompt.
    """

    adapter_layer_names: tuple[str, ...] = ("mmtune_tokens",)
    other_param_names: tuple[str, ...] = ("at",)

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk
        self.mmtune_tokens = nn.ParameterDict()
        self.at: dict[str, tuple[int, ...]] = {}
        self.ensemble: tuple[str, ...] = ()
        # Where the tokens of the present call entered; empty outside the trunk.
        self._inside: tuple[int, ...] = ()
        # Where several methods share a trunk, the last to enter are the first to leave, and places
        # count the tokens of methods attached before. The hooks are bound methods, so that a deep
        # copy of the model calls the copy's tokens.
        leaving = (
            trunk.module.register_forward_hook(self._leave_output, prepend=True)
            if trunk.exit is None
            else trunk.exit.register_forward_pre_hook(self._leave_input, prepend=True)
        )
        entering = trunk.module.register_forward_pre_hook(self._enter, with_kwargs=True)
        self._handles = [entering, leaving]

    def tokens(self, name: str) -> Tensor:
        """The tokens of an adapter as they enter, [p, d]."""
        return self.mmtune_tokens[name]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._inside = ()
        names = [n for n in self.ensemble or self.active_adapters if n in self.mmtune_tokens]
        if self.disable_adapters or not names:
            return None
        if self.ensemble:
            at = self.at[names[0]]
        else:
            at = tuple(place for name in names for place in self.at[name])
        if not self.trunk.entering(args, kwargs):
            return self.trunk.carry(args, kwargs, at)
        self._inside = at
        tokens = [self.tokens(name) for name in names]
        rows = self.trunk.batch_size(args, kwargs)
        if self.ensemble:
            batch = torch.stack(tokens).repeat_interleave(_share(rows, len(tokens)), dim=0)
        else:
            batch = torch.cat(tokens).expand(rows, -1, -1)
        return self.trunk.enter(args, kwargs, batch, at)

    def _leave_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        at, self._inside = self._inside, ()
        return self.trunk.leave(output, at) if at else output

    def _leave_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        at, self._inside = self._inside, ()
        return (self.trunk.leave(args[0], at), *args[1:]) if at else args


def _share(rows: int, prompts: int) -> int:
    """Rows of a batch for each prompt. Raises ValueError where they cannot be shared out evenly."""
    if rows % prompts:
        raise ValueError(
            f"an ensemble of {prompts} prompts needs a batch of {prompts} equal blocks of rows, "
            f"got {rows} rows: repeat the batch {prompts} times along its first axis"
        )
    return rows // prompts


@dataclass
class VirtualTokensConfig(SitedConfig):
    """What prompt tuning and P-tuning have in common.

    Args:
        tokens: p, virtual tokens in each branch.
        branches, layers, seed, adapted: see `SitedConfig`; layers must be "all".
    """

    key: ClassVar[str]

    tokens: int = 16

    def problems(self) -> Iterator[str]:
        if self.tokens < 1:
            yield f"{self.key}.tokens must be at least 1, got {self.tokens}. Try 16."
        if self.layers != "all":
            yield (
                f"{self.key}.layers must be 'all', got {self.layers!r}: virtual tokens enter at a "
                "branch's input and pass through all of its layers. Choose among branches instead."
            )


class VirtualTokensTuner(SitedTuner):
    """Puts one `TrunkTokens` for each chosen branch into the model's root."""

    # Start of their names in the root; not PEFT's prefix, whose modules it skips on deletion.
    attribute: ClassVar[str]
    unmergeable = "virtual tokens are part of the input, and no weight can hold them"
    uses_shared_state = True

    def _choose(self, backbone: Backbone, config: Any) -> Sequence[Trunk]:
        trunks = backbone.trunks()
        for branch in trunks if config.branches is None else config.branches:
            if branch not in trunks:
                have = ", ".join(trunks) or "none"
                raise SiteError(
                    f"{config.key}: virtual tokens enter where a branch takes its input; "
                    f"{branch!r} of {backbone.family} has no such place. Branches that have one: "
                    f"{have}."
                )
        chosen = [t for b, t in trunks.items() if config.branches is None or b in config.branches]
        if not chosen:
            raise SiteError(
                f"{config.key}: no branch of this {backbone.family} takes virtual tokens"
            )
        for trunk in chosen:
            _check_room(trunk, config)
        return chosen

    def _adapt(self, config: Any, adapter_name: str, target: Any, site: Trunk) -> nn.Module:
        make = cast(Any, self.tuner_layer_cls)
        holder = self._attach(f"{self.attribute}_{site.branch}", partial(make, site))
        self._fill(holder, adapter_name, config)
        device = next(target.parameters(), next(self.model.parameters())).device
        self._settle(holder, adapter_name, device)
        return target

    def _fill(self, holder: Any, adapter_name: str, config: Any) -> None:
        """Give `holder` a fresh adapter."""
        raise NotImplementedError


def _check_room(trunk: Trunk, config: VirtualTokensConfig) -> None:
    # The begin and end tokens of a text, and one word.
    if trunk.context is not None and config.tokens >= trunk.context - 2:
        raise ValueError(
            f"{config.key}.tokens is {config.tokens}, but {trunk.branch} was trained on texts of "
            f"{trunk.context} tokens, begin and end included. Use at most {trunk.context - 3}."
        )
