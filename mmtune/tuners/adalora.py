"""AdaLoRA: PEFT's, aimed at sites, with its schedule and penalty driven by a training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import AdaLoraConfig, AdaLoraModel, PeftModel
from peft.tuners.adalora import AdaLoraLayer, RankAllocator
from torch import Tensor, nn

from mmtune.backbones import backbone_of
from mmtune.tuners.hooks import TrainingHooks
from mmtune.tuners.presets import only
from mmtune.tuners.registry import Method
from mmtune.tuners.sited import require_linear

# Steps of the schedule until a run says how many it has; PEFT wants a number from the start.
NOMINAL_STEPS = 1000


@dataclass
class AdaLoraOptions:
    """AdaLoRA: updates of low rank, whose ranks move to the weights where they matter most.

        W x + (alpha / init_rank) P diag(lambda) Q x

    for every adapted weight. While training, the triplets (a column of P, an entry of lambda, a row
    of Q) that matter least lose their lambda, so that the ranks of all weights together fall from
    init_rank to target_rank on average, along a cubic curve.

    Trainable parameters: init_rank (d_in + d_out) + init_rank for each adapted weight; the saved
    adapter has the ranks that were kept.

    Attributes:
        init_rank: triplets of each weight at the start; 1.5 times the target in the paper.
        target_rank: triplets of a weight at the end, on average.
        alpha: see above.
        dropout: probability of dropping an input feature of the update.
        initial_share: share of all steps before the first triplet is cut (the paper's t_i / T).
        final_share: share of all steps after the last one is (the paper's t_f / T).
        delta_t: steps between two cuts.
        beta1: smoothing of a weight's sensitivity.
        beta2: smoothing of the sensitivity's uncertainty.
        orthogonality: factor on the penalty that keeps P and Q orthogonal.
        branches: branches to adapt; None means all.
        sites: roles to adapt, or branch -> roles.
        layers: "all", "first:N", "last:N", or indices within each branch.
    """

    init_rank: int = 12
    target_rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    initial_share: float = 0.1
    final_share: float = 0.4
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    branches: list[str] | None = None
    sites: list[str] | dict[str, list[str]] = field(
        default_factory=lambda: ["q", "k", "v", "out", "fc1", "fc2"]
    )
    layers: Any = "all"

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        if not 1 <= self.target_rank < self.init_rank:
            yield (
                f"adalora.target_rank must be in 1..{self.init_rank - 1} (below init_rank), got "
                f"{self.target_rank}. Without ranks to cut, use lora."
            )
        for name in ("initial_share", "final_share"):
            if not 0 <= getattr(self, name) < 1:
                yield f"adalora.{name} must be in [0, 1), got {getattr(self, name)}"
        if self.initial_share + self.final_share >= 1:
            yield (
                "adalora.initial_share + final_share must be below 1, so that steps are left to "
                f"cut ranks in; got {self.initial_share} + {self.final_share}"
            )
        if self.delta_t < 1:
            yield f"adalora.delta_t must be at least 1, got {self.delta_t}"
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                yield f"adalora.{name} must be in (0, 1), got {getattr(self, name)}. Try 0.85."
        if self.orthogonality < 0:
            yield f"adalora.orthogonality must not be negative, got {self.orthogonality}"


def adalora_config(
    model: nn.Module,
    options: AdaLoraOptions | None = None,
    total_steps: int = NOMINAL_STEPS,
    **settings: Any,
) -> AdaLoraConfig:
    """PEFT's AdaLoraConfig for the chosen sites of `model`, whose fused attention it splits.

    Args:
        model: a stock model that some backbone describes.
        options: the settings; or give them by keyword.
        total_steps: optimiser steps of the training to come. `mmtune.training.train` stretches the
            schedule to its own number; a loop of your own calls `update_and_allocate(step)` after
            each optimiser step, with steps counted from 1.
        **settings: fields of AdaLoraOptions.

    Source:
        AdaLoRA, arXiv 2303.10512; the implementation is PEFT's, which follows the released code.
        Differs from the paper: sensitivity multiplies the gradient by the weight after the step,
        and the penalty is the mean of the norms (see `regularization_loss`).
    """
    chosen = options if options is not None else AdaLoraOptions(**settings)
    backbone = backbone_of(model)
    backbone.prepare()
    sites = backbone.select(chosen.branches, chosen.sites, chosen.layers)
    require_linear(sites, "adalora")
    return AdaLoraConfig(
        init_r=chosen.init_rank,
        target_r=chosen.target_rank,
        lora_alpha=chosen.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=chosen.dropout,
        tinit=round(chosen.initial_share * total_steps),
        tfinal=round(chosen.final_share * total_steps),
        total_step=total_steps,
        deltaT=chosen.delta_t,
        beta1=chosen.beta1,
        beta2=chosen.beta2,
        orth_reg_weight=chosen.orthogonality,
        target_modules=only([site.path for site in sites]),
    )


def regularization_loss(model: PeftModel) -> Tensor:
    """How far P and Q of the active adapter are from orthogonal, without the factor.

    The mean over all matrices of ||P^T P - I||_F and ||Q Q^T - I||_F. The paper adds the squares;
    this is what the released code and PEFT compute.
    """
    name = str(model.active_adapter)
    norms = []
    for layer in model.modules():
        if isinstance(layer, AdaLoraLayer) and name in layer.lora_A:
            p, q = layer.lora_B[name], layer.lora_A[name]
            if q.numel():
                with torch.autocast(q.device.type, enabled=False):
                    norms += [_distance(p.T @ p), _distance(q @ q.T)]
    return torch.stack(norms).mean()


def _distance(gram: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device))


class AdaLoraTuner(AdaLoraModel):
    """PEFT's AdaLoraModel with what it lacks; adapters stay PEFT's, in files and in memory.

    The penalty is added to a loss that the model returns only while training (PEFT also adds it in
    evaluation, and fails on a frozen adapter). Several adapters may be trained in turn. Cutting
    ranks keeps the dtype of the adapter, which in PEFT falls to that of the base.
    """

    # A run's hooks add the penalty to every task's loss; then this must not, as it would for a
    # config with a task type and a model that returns its loss.
    adds_penalty = True

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        # PEFT takes the pattern for LoRA's rank_pattern and warns that it matches no module.
        config: Any = self.peft_config[adapter_name]
        pattern, config.rank_pattern = config.rank_pattern, None
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config.rank_pattern = pattern

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training and self.adds_penalty and hasattr(self, "trainable_adapter_name"):
            return super().forward(*args, **kwargs)
        return self.model(*args, **kwargs)

    def _check_new_adapter_config(self, config: Any) -> None:
        # Past AdaLoraModel, which refuses a second adapter that is not frozen.
        super(AdaLoraModel, self)._check_new_adapter_config(config)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        if not inference_mode:
            name = adapter_name if isinstance(adapter_name, str) else adapter_name[0]
            self.allocate_for(name)

    def allocate_for(self, adapter_name: str) -> None:
        """Start to score the triplets of this adapter."""
        self.trainable_adapter_name = adapter_name
        config = self.peft_config[adapter_name]
        self.rankallocator = RankAllocator(self.model, config, adapter_name)

    def resize_modules_by_rank_pattern(
        self, rank_pattern: Mapping[str, list[bool]], adapter_name: str
    ) -> None:
        """Keep only the triplets that are marked; layers that were cut before are left alone."""
        for name, kept in rank_pattern.items():
            layer: Any = self.model.get_submodule(name.partition(".lora_E")[0])
            if len(layer.lora_E[adapter_name]) != len(kept):
                continue
            for group in (layer.lora_E, layer.lora_A, layer.lora_B):
                old = group[adapter_name]
                cut = old.detach()[:, kept] if group is layer.lora_B else old.detach()[kept]
                group[adapter_name] = nn.Parameter(cut, requires_grad=old.requires_grad)
            layer.r[adapter_name] = sum(kept)


class AdaLoraHooks(TrainingHooks):
    """The schedule, the scores and the penalty of AdaLoRA in a training run.

    A triplet's score comes from `Parameter.grad` as the optimiser saw it: the mean over the step's
    micro-batches, penalty included, scaled down where `max_grad_norm` clips.

    An adapter whose ranks were cut in an earlier run trains on with those ranks.
    """

    def __init__(self, model: PeftModel, total_steps: int, seed: int) -> None:
        self.model, self.tuner = model, cast(AdaLoraTuner, model.base_model)
        self.name = str(model.active_adapter)
        self.config = cast(AdaLoraConfig, model.peft_config[self.name])
        self.allocates = self.config.rank_pattern is None
        self.kept: dict[str, list[bool]] | None = None
        if self.allocates:
            _stretch(self.config, total_steps)
        self.tuner.allocate_for(self.name)
        self.tuner.adds_penalty = False

    def penalty(self) -> Tensor | None:
        if not self.config.orth_reg_weight:
            return None
        return self.config.orth_reg_weight * regularization_loss(self.model)

    def after_step(self, step: int) -> None:
        if not self.allocates:
            return
        self._require_gradients()
        # Between steps the config holds no pattern: PEFT would save and load tensors that are cut
        # by it, and a run that is resumed needs all of them.
        self.config.rank_pattern = self.kept
        self.tuner.update_and_allocate(step)
        self.kept, self.config.rank_pattern = self.config.rank_pattern, None

    def state_dict(self) -> dict[str, Tensor]:
        scores = self.tuner.rankallocator
        state = {f"sensitivity.{n}": t for n, t in scores.exp_avg_ipt.items()}
        state |= {f"uncertainty.{n}": t for n, t in scores.exp_avg_unc.items()}
        return state | {f"kept.{n}": torch.tensor(k) for n, k in (self.kept or {}).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        scores = self.tuner.rankallocator
        scores.exp_avg_ipt, scores.exp_avg_unc, kept = (
            {n.partition(".")[2]: t for n, t in state.items() if n.startswith(f"{kind}.")}
            for kind in ("sensitivity", "uncertainty", "kept")
        )
        # Overwritten in the next step; PEFT starts the averages afresh for names that are not here.
        scores.ipt = dict(scores.exp_avg_ipt)
        device = next(self.model.parameters()).device
        for average in (scores.exp_avg_ipt, scores.exp_avg_unc):
            average.update({n: t.to(device) for n, t in average.items()})
        self.kept = {n: t.tolist() for n, t in kept.items()} or None

    def finish(self) -> None:
        """Drop the triplets without a lambda; the update they leave behind is the same."""
        self.tuner.adds_penalty = True
        if self.kept is None:
            return
        pattern: dict[str, list[bool]] = {}
        for name, parameter in self.tuner.model.named_parameters():
            if name.endswith(f".lora_E.{self.name}"):
                kept = (parameter != 0).flatten().tolist()
                # PEFT takes an empty tensor for a broken file: one triplet stays, lambda zero.
                pattern[name] = kept if any(kept) else [True, *kept[1:]]
        self.config.rank_pattern = pattern
        self.tuner.resize_modules_by_rank_pattern(pattern, self.name)

    def _require_gradients(self) -> None:
        for name, parameter in self.tuner.model.named_parameters():
            if parameter.requires_grad and parameter.grad is None and f".{self.name}" in name:
                raise ValueError(
                    f"adalora scores weights by their gradients, and {name} has none: this task "
                    "does not use it. Choose tuner.branches and tuner.sites that it does."
                )


def _stretch(config: AdaLoraConfig, total_steps: int) -> None:
    """Fit a schedule to a run of `total_steps`; its phases keep their shares.

    Raises:
        ValueError: too few steps to score the weights once and then cut.
    """
    planned = cast(int, config.total_step)
    config.tinit, config.tfinal = (
        round(steps * total_steps / planned) for steps in (config.tinit, config.tfinal)
    )
    config.total_step = total_steps
    last_cut = total_steps - config.tfinal
    if last_cut < 2 or config.tinit >= last_cut:
        raise ValueError(
            f"adalora has no step to cut ranks in: of {total_steps} steps, {config.tinit} come "
            f"before and {config.tfinal} after. Train longer (training.epochs), or lower "
            "tuner.initial_share and tuner.final_share."
        )


PEFT_METHODS = {"ADALORA": (AdaLoraConfig, AdaLoraTuner)}
METHODS = (
    Method(
        name="adalora",
        summary="LoRA as P diag(lambda) Q; ranks move to the weights that matter (PEFT's)",
        source="arXiv 2303.10512 (ICLR 2023)",
        options=AdaLoraOptions,
        build=adalora_config,
        hooks=AdaLoraHooks,
    ),
)
