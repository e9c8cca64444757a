"""Analyses: what they write, and that they go on where they were stopped."""

from __future__ import annotations

import json
import re

import pytest
import torch

from mmtune.analysis import running, sources
from mmtune.analysis.decompositions import fit_tucker, frame_of, svd_errors
from mmtune.analysis.deltas import stacked
from mmtune.analysis.running import FITS, LINES, PAGE, analyze
from mmtune.analysis.tables import fit_sheet, heat_maps, sheets
from tests.analysis import made

BUDGETS = (0.25, 1.0)


def small(**settings):
    return made.aurora(rank=3, sites=["q", "fc2"], **settings)


@pytest.fixture
def run(tmp_path):
    return made.run(tmp_path / "small", made.wrap(small()))


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """Run, source and analysis, for tests that only look."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmtune.backbones.load", made.load)
        run = made.run(tmp_path_factory.mktemp("runs") / "small", made.wrap(small()))
        return run, *study(run)


def study(run, out=None, **settings):
    """The source of a run, and its analysis with few and small decompositions."""
    source = sources.find(run)
    settings = {"budgets": BUDGETS, "starts": 2, "progress": False, **settings}
    return source, analyze(source, out or run / "analysis", **settings)


def lines(folder):
    return [json.loads(line) for line in (folder / LINES).read_text().splitlines()]


def test_lines_hold_what_a_second_computation_finds(studied):
    run, source, _ = studied
    records = lines(run / "analysis")
    stacks = {stack.key: stack for stack in stacked(source.deltas)}
    assert records[0]["title"] == "small: aurora on test:open_clip"
    found = {kind: [r for r in records if r["kind"] == kind] for kind in ("stack", "fit")}
    for record in found["stack"]:
        tensor = stacks[record["stack"]].tensor
        assert record["shape"] == list(tensor.shape)
        assert record["norm"] == pytest.approx(float(tensor.double().norm()))
        norms = [mode["norm"] for mode in record["modes"]]
        for m in (0, 4, 9):
            assert norms[m] == pytest.approx(float(tensor[..., m].norm()), rel=1e-5)
    for record in found["fit"]:
        assert record["numbers"] <= record["budget"]
        tensor = stacks[record["stack"]].tensor
        if record["method"] == "svd":
            want = float(svd_errors(tensor)[record["rank"] - 1])
        elif record["method"] == "tucker":
            want = fit_tucker(frame_of(tensor), record["rank"]).error
        else:
            continue
        assert record["error"] == pytest.approx(want, abs=1e-9)


def test_factors_explain_their_stack_at_their_own_size(studied):
    _, _, found = studied
    own = [fit for fit in found.fits if fit.method == "cp" and fit.rank == 3]
    assert {fit.stack for fit in own} == {"48x48", "32x32"}
    assert all(fit.error < 1e-5 for fit in own)
    assert all(sum(c.energies) == pytest.approx(1) for c in found.components)


def test_heat_maps_have_a_cell_for_every_block(studied):
    _, source, found = studied
    maps = {heat.branch: heat for heat in heat_maps(found)}
    columns = ["q", *(f"fc2 {i}" for i in range(1, 5))]
    assert {branch: heat.projections for branch, heat in maps.items()} == {
        "vision": columns,
        "text": columns,
    }
    fc2 = next(
        d for d in source.deltas if (d.site.branch, d.site.layer, d.site.role) == ("text", 1, "fc2")
    )
    heat = maps["text"]
    norm = heat.norms[heat.layers.index("1")][columns.index("fc2 3")]
    assert norm == pytest.approx(float(fc2.weight[:, 64:96].norm()), rel=1e-5)


class Stopper:
    """Counts decompositions, and stops like Ctrl-C before one of them."""

    def __init__(self, monkeypatch, at=None):
        self.fit, self.calls, self.at = running._fit, 0, at
        monkeypatch.setattr(running, "_fit", self)

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.fit(*arguments)


def test_a_stopped_analysis_goes_on(run, tmp_path, monkeypatch):
    _, whole = study(run, tmp_path / "whole")
    with monkeypatch.context() as patch:
        Stopper(patch, at=6)
        with pytest.raises(KeyboardInterrupt):
            study(run)
    out = run / "analysis"
    assert [path.name for path in out.iterdir()] == [FITS]
    with (out / FITS).open("a") as file:
        file.write('{"of": {"stack": "cut off')
    with monkeypatch.context() as patch:
        counter = Stopper(patch)
        _, again = study(run)
    distinct = {(fit.stack, fit.method, fit.rank) for fit in whole.fits}
    assert counter.calls == len(distinct) - 5
    assert again == whole
    assert (out / LINES).read_text() == (tmp_path / "whole" / LINES).read_text()


def test_other_updates_or_settings_are_computed_anew(studied, tmp_path, monkeypatch):
    out, quick = tmp_path / "shared", {"budgets": [0.25], "starts": 1}
    other = made.run(tmp_path / "other", made.wrap(small(), seed=9))
    calls = []
    for run, changes in ((studied[0], {}), (studied[0], {"seed": 1}), (other, {})):
        with monkeypatch.context() as patch:
            counter = Stopper(patch)
            _, found = study(run, out, **quick, **changes)
            calls.append(counter.calls)
    assert calls == [calls[0]] * 3
    assert found == study(other, tmp_path / "alone", **quick)[1]


def test_page_needs_nothing_else_and_shows_the_numbers(studied):
    run, _, found = studied
    page = (run / "analysis" / PAGE).read_text()
    assert "<script" not in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("#", "data:")) for link in links)
    for sheet in sheets(found):
        for line in sheet.lines:
            assert all(f">{text}</td>" in page for text in line)
    assert page.count("<svg") == 2 + 2 + 2 + 2


def test_fresh_adapter_is_analysed(tmp_path):
    run = made.run(tmp_path / "fresh", made.wrap(made.lora(), zero=True), method="lora")
    _, found = study(run)
    assert all(stack.norm == 0 for stack in found.stacks)
    assert all(fit.error == 0 for fit in found.fits)
    assert "||dW||" in (run / "analysis" / PAGE).read_text()


def test_a_budget_too_small_for_anything_is_said_to_be(tmp_path):
    model = made.wrap(made.lora(sites=["q"], branches=["vision"], layers=[0]))
    run = made.run(tmp_path / "one", model, method="lora")
    _, found = study(run, budgets=[1.0])
    ((stack, budget, svd, *others),) = fit_sheet(found).lines
    assert (stack, budget, others) == ("48x48", "96", ["too few", "too few", ""])
    source = sources.find(run)
    values = torch.linalg.svdvals(source.deltas[0].weight)
    want = float(values[1:].norm() / values.norm())
    assert svd == f"{want:.4f} [1]"


def test_results_do_not_hang_on_the_global_generator(studied, tmp_path):
    run, _, first = studied
    with torch.random.fork_rng():
        torch.manual_seed(first.parameters)
        assert study(run, tmp_path)[1] == first
