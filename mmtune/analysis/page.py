"""An analysis as one HTML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmtune.analysis.plots import component_curve, error_curves, heat_map, spectrum_curves
from mmtune.analysis.tables import (
    component_sheet,
    fit_sheet,
    heat_maps,
    similarity_sheet,
    spectrum_sheet,
)
from mmtune.report.html import fill
from mmtune.report.numbers import Fact

if TYPE_CHECKING:
    from mmtune.analysis.running import Analysis


def render_page(analysis: Analysis, manifest: Mapping[str, Any]) -> str:
    """The page of an analysis."""
    stacks = analysis.stacks
    learned = [found for found in analysis.components if any(found.energies)]
    live = [stack for stack in stacks if stack.norm]
    fits = {stack.stack: [f for f in analysis.fits if f.stack == stack.stack] for stack in live}
    return fill(
        "analysis.html",
        title=analysis.title,
        facts=_facts(analysis),
        heat_maps=[heat_map(heat) for heat in heat_maps(analysis)],
        sections=[
            (component_sheet(analysis), [component_curve(found) for found in learned]),
            (similarity_sheet(analysis), []),
            (spectrum_sheet(analysis), [spectrum_curves(stack) for stack in live]),
            (
                fit_sheet(analysis),
                [error_curves(key, found) for key, found in fits.items() if found],
            ),
        ],
        manifest=manifest,
    )


def _facts(analysis: Analysis) -> list[Fact]:
    blocks = sum(stack.shape[2] for stack in analysis.stacks)
    norm = math.hypot(*(stack.norm for stack in analysis.stacks))
    facts = [
        Fact("trained parameters", f"{analysis.parameters:,}"),
        Fact("blocks", f"{blocks:,}", f"of {len(analysis.stacks)} shapes"),
        Fact("||dW||", f"{norm:.3g}", "all updates together"),
    ]
    if analysis.left_out:
        facts.append(Fact("not shown", f"{analysis.left_out:,}", "trained, but no weight updates"))
    return facts
