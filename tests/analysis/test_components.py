"""Learned components against explicit sums, and similarities of made-up stacks."""

from __future__ import annotations

import pytest
import torch

from mmtune.analysis import sources
from mmtune.analysis.components import Learned, holding, learned_of, similarities
from mmtune.analysis.deltas import Block, Stack, stacked
from tests.analysis import made


def learned(core, rank=3, d_out=5, d_in=4, m=6):
    g = torch.Generator().manual_seed(2)
    shape = (rank,) if core == "diagonal" else (rank, rank, rank)
    sizes = ((rank, d_in), (d_out, rank), shape, (m, rank))
    u, v, mixing, modes = (torch.randn(*s, generator=g, dtype=torch.float64) for s in sizes)
    return Learned("5x4", u, v, mixing, modes, ())


def component(one, k):
    """[d_out, d_in, M]: what component k of the modes adds to every block, from the definition."""
    if one.core.dim() == 1:
        matrix = one.core[k] * torch.outer(one.v[:, k], one.u[k])
    else:
        matrix = one.v @ one.core[:, :, k].T @ one.u
    return matrix[..., None] * one.modes[:, k]


@pytest.mark.parametrize("core", ["diagonal", "dense"])
def test_norms_are_those_of_each_components_part_of_the_stack(core):
    one = learned(core)
    norms = one.norms()
    for k in range(3):
        assert float(norms[k]) == pytest.approx(float(component(one, k).norm()), rel=1e-12)


@pytest.mark.parametrize("core", ["diagonal", "dense"])
def test_components_add_up_to_the_updates(core, tmp_path):
    ranks = {"text": 2} if core == "diagonal" else {}
    config = made.aurora(core=core, alpha=0.5, branch_ranks=ranks)
    folder = made.save(made.wrap(config), tmp_path / "adapter")
    source = sources.find(folder, base="test:open_clip")
    for stack in stacked(source.deltas):
        one = learned_of(stack, source.learned)
        assert one is not None
        together = sum(component(one, k) for k in range(3))
        torch.testing.assert_close(together.float(), stack.tensor, atol=1e-6, rtol=1e-5)


def test_cp_start_holds_the_heaviest_components():
    one = learned("diagonal")
    a, b, c = one.cp(2, torch.Generator().manual_seed(0))
    heaviest = one.norms().argsort(descending=True)[:2]
    want = sum(component(one, int(k)) for k in heaviest)
    torch.testing.assert_close(torch.einsum("or,ir,mr->oim", a, b, c), want)
    assert [f.shape[1] for f in one.cp(7, torch.Generator().manual_seed(0))] == [7, 7, 7]
    assert learned("dense").cp(2, torch.Generator()) is None


def test_branches_with_factors_of_their_own_are_told_apart(tmp_path):
    folder = made.save(
        made.wrap(made.aurora(sharing="branch"), name="blip-vqa"), tmp_path / "adapter"
    )
    source = sources.find(folder, base="test:blip-vqa")
    keys = {one.key for one in source.learned}
    assert {"vision_48x48", "text_48x48", "language_48x48"} <= keys
    for one in source.learned:
        assert {block.branch for block in one.blocks} == {one.key.partition("_")[0]}
    assert source.left_out > 0  # gates and contexts of the layers that read the image


@pytest.mark.parametrize(
    ("settings", "left"),
    [({"block_layout": "interleaved"}, []), ({"branch_ranks": {"text": 2}}, ["48x48"])],
)
def test_updates_that_are_no_sums_have_no_components(settings, left, tmp_path):
    folder = made.save(made.wrap(made.aurora(core="dense", **settings)), tmp_path / "adapter")
    source = sources.find(folder, base="test:open_clip")
    assert [one.key for one in source.learned] == left


def test_holding_counts_the_largest_shares():
    shares = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
    assert [holding(shares, part) for part in (0.5, 0.6, 0.7, 0.9, 0.95)] == [1, 1, 2, 2, 3]
    assert holding(torch.zeros(4), 0.9) == 0


def two_branches(*columns):
    """A stack of 2x1 blocks, the first two in vision, the others in text."""
    names = ["vision", "vision", *["text"] * (len(columns) - 2)]
    blocks = tuple(Block(name, i, "q", 0, f"{name}.{i}") for i, name in enumerate(names))
    return Stack("2x1", torch.tensor(columns, dtype=torch.float32).T[:, None, :], blocks)


def test_similarities_of_branches_are_mean_cosines():
    stack = two_branches((1, 0), (0, 2), (3, 0), (-1, 1))
    found = {s.branches: s.updates for s in similarities(stack, None)}
    half = 0.5**0.5
    assert found["vision", "vision"] == pytest.approx(0)
    assert found["text", "text"] == pytest.approx(half)
    assert found["vision", "text"] == pytest.approx((1 + half + 0 + half) / 4)


def test_blocks_without_an_update_are_like_nothing():
    stack = two_branches((1, 0), (0, 0), (0, 0))
    found = {s.branches: s.updates for s in similarities(stack, None)}
    assert set(found.values()) == {None}


def test_branches_that_use_other_components_are_unlike():
    stack = two_branches((1, 0), (0, 2), (3, 0), (-1, 1))
    one = learned("diagonal", m=4)
    one.modes.copy_(torch.tensor([[1, 0, 0], [2, 0, 0], [0, 5, 0], [0, 0, 1]]))
    shared = Learned(one.key, one.u, one.v, one.core, one.modes, stack.blocks)
    uses = {s.branches: s.components for s in similarities(stack, shared)}
    assert uses["vision", "text"] == pytest.approx(0)
    shared.modes[3] = torch.tensor([5.0, 0.0, 0.0])
    uses = {s.branches: s.components for s in similarities(stack, shared)}
    assert uses["vision", "text"] == pytest.approx(0.5**0.5)
