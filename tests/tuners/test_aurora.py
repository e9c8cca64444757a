"""Aurora's own mathematics, and what it refuses."""

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmtune import AuroraConfig, load_adapter
from mmtune.backbones.base import Site, SiteError
from mmtune.conformance.backbones import build
from mmtune.tuners.aurora.factors import Blocks, ModeFactors, cut, mixers
from mmtune.tuners.aurora.layer import AuroraLinear
from mmtune.tuners.registry import methods
from mmtune.tuners.sited import AdapterMismatchError


def layer(blocks, rank=3, dtype=torch.float64, seed=0, **settings):
    """An adapted Linear with every factor random (V too)."""
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(blocks.columns * blocks.d_in, blocks.rows * blocks.d_out)
    factors = ModeFactors()
    factors.add_adapter("default")
    config = AuroraConfig(rank=rank, **settings)
    adapted = AuroraLinear(base, factors)
    adapted.add_adapter("default", blocks.shape_key, blocks, rank, config, generator)
    for group in (factors.aurora_V, factors.aurora_core):
        for p in group["default"].values():
            p.data = torch.randn(p.shape, generator=generator)
    return adapted.to(dtype), factors.to(dtype)


SHAPES = st.builds(
    Blocks,
    d_out=st.integers(1, 5),
    d_in=st.integers(1, 5),
    rows=st.integers(1, 3),
)
WIDE = st.builds(Blocks, d_out=st.integers(1, 5), d_in=st.integers(1, 5), columns=st.integers(1, 3))


@given(
    blocks=st.one_of(SHAPES, WIDE),
    rank=st.integers(1, 4),
    core=st.sampled_from(["diagonal", "dense", "interleaved"]),
    alpha=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_both_paths_and_the_merge_are_one_function(blocks, rank, core, alpha, seed):
    settings = {"core": "dense" if core == "interleaved" else core, "alpha": alpha}
    if core == "interleaved":
        settings["block_layout"] = "interleaved"
    x = torch.randn(2, 4, blocks.columns * blocks.d_in, dtype=torch.float64)
    separate, _ = layer(blocks, rank, seed=seed, **settings)
    whole, _ = layer(blocks, rank, seed=seed, compute="materialise", **settings)
    whole.load_state_dict(separate.state_dict())
    y = separate(x)
    assert torch.allclose(whole(x), y, atol=1e-10)
    delta = separate.get_delta_weight("default")
    assert torch.allclose(separate.base_layer(x) + x @ delta.T, y, atol=1e-10)
    separate.merge()
    assert torch.allclose(separate(x), y, atol=1e-10)


@given(blocks=st.one_of(SHAPES, WIDE), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_diagonal_core_is_the_sum_of_rank_one_terms(blocks, seed):
    adapted, factors = layer(blocks, 3, seed=seed)
    u, v, lam = factors.of("default", blocks.shape_key, 3)
    modes = adapted.aurora_modes["default"]
    dw = [
        sum(lam[r] * modes[m, r] * torch.outer(v[:, r], u[r]) for r in range(3))
        for m in range(blocks.count)
    ]
    want = torch.cat(dw, 1 if blocks.columns > 1 else 0)
    assert torch.allclose(adapted.get_delta_weight("default"), want, atol=1e-12)


@pytest.mark.parametrize("compute", ["separate", "materialise", "auto"])
@pytest.mark.parametrize("core", ["diagonal", "dense"])
@pytest.mark.parametrize("blocks", [Blocks(3, 2), Blocks(2, 2, rows=2), Blocks(2, 2, columns=2)])
def test_gradients_in_float64(compute, core, blocks):
    adapted, factors = layer(blocks, 2, core=core, compute=compute)
    inputs = [
        torch.randn(3, blocks.columns * blocks.d_in, dtype=torch.float64, requires_grad=True),
        adapted.aurora_modes["default"],
        *(
            g["default"][blocks.shape_key]
            for g in (factors.aurora_U, factors.aurora_V, factors.aurora_core)
        ),
    ]

    def run(x, *_):
        return adapted(x)

    assert torch.autograd.gradcheck(run, inputs)


def test_interleaving_mixes_the_modes_as_documented():
    """Column a R + n of block a comes from j = (a R + n) div 4, k = (a R + n) mod 4."""
    r, n = 3, 4
    core, modes = torch.randn(r, r, r), torch.randn(n, r)
    g = torch.einsum("ijl,kl->ijk", core, modes)
    found = mixers(core, modes, interleaved=True, rows=True)
    for a in range(n):
        for column in range(r):
            j, k = divmod(a * r + column, n)
            assert torch.allclose(found[a, :, column], g[:, j, k], atol=1e-6)
    turned = mixers(core, modes, interleaved=True, rows=False)
    assert torch.equal(turned, found.transpose(1, 2))


def test_only_v_has_a_gradient_at_the_first_step():
    blocks = Blocks(4, 4)
    adapted, factors = layer(blocks)
    factors.aurora_V["default"]["4x4"].data.zero_()
    adapted(torch.randn(2, 4, dtype=torch.float64)).pow(2).sum().backward()
    assert factors.aurora_V["default"]["4x4"].grad.abs().sum() > 0
    assert factors.aurora_U["default"]["4x4"].grad.abs().sum() == 0
    assert adapted.aurora_modes["default"].grad.abs().sum() == 0


def test_dropout_acts_while_training_only():
    adapted, _ = layer(Blocks(4, 4), rank=64, dropout=0.5)
    x = torch.randn(2, 4, dtype=torch.float64)
    adapted.train()
    assert not torch.equal(adapted(x), adapted(x))
    adapted.eval()
    assert torch.equal(adapted(x), adapted(x))
    delta = adapted.get_delta_weight("default")
    assert torch.allclose(adapted(x), adapted.base_layer(x) + x @ delta.T)


def test_cut_by_role_and_width():
    site = Site("vision", 0, "fc1", "p", nn.Identity(), 48)
    assert cut(site, 192, 48) == Blocks(48, 48, rows=4)
    assert cut(site, 100, 48) == Blocks(100, 48)
    assert cut(Site("vision", 0, "fc2", "p", nn.Identity(), 48), 48, 192) == Blocks(
        48, 48, columns=4
    )
    assert cut(Site("fusion", 0, "cross_k", "p", nn.Identity(), 32), 32, 48) == Blocks(32, 48)


def test_factors_are_shared_and_saved_once(tmp_path):
    model = peft.get_peft_model(build("clip"), AuroraConfig(rank=4))
    layers = [m for m in model.modules() if isinstance(m, AuroraLinear)]
    assert len(layers) == 16
    assert len({id(m.factors) for m in layers}) == 1
    names = [n for n, p in model.named_parameters() if p.requires_grad and "modes" not in n]
    assert len(names) == 2 * 3  # U, V, core of 48x48 and 32x32


def test_seed_makes_the_factors(tmp_path):
    def factors(seed):
        model = peft.get_peft_model(build("clip"), AuroraConfig(rank=4, seed=seed))
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    a, b, c = factors(3), factors(3), factors(4)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0. Try 64"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"core": "full"}, "core must be diagonal or dense, got 'full'"),
        ({"sharing": "none"}, "sharing must be all, branch or layer, got 'none'"),
        ({"gate": "sigmoid"}, "gate must be None, off, tanh or reference, got 'sigmoid'"),
        ({"context": True}, "context must be None, off, tokens, batch or reference, got True"),
        ({"block_layout": "interleaved"}, "set core: dense"),
        ({"branch_ranks": {"text": 65}}, r"branch_ranks.text must be in 1..64"),
        ({"compute": "materialise", "dropout": 0.1}, "compute: separate"),
    ],
)
def test_bad_settings_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        AuroraConfig(**settings)


def test_all_bad_settings_are_told_at_once():
    with pytest.raises(ValueError, match="rank") as error:
        AuroraConfig(rank=0, dropout=2, core="x")
    assert len(str(error.value).splitlines()) == 3


def test_bad_places_are_told():
    with pytest.raises(SiteError, match="no site 'qq'"):
        peft.get_peft_model(build("clip"), AuroraConfig(sites=["qq"]))
    with pytest.raises(SiteError, match="norm"):
        peft.get_peft_model(build("clip"), AuroraConfig(sites=["norm"]))
    with pytest.raises(ValueError, match="branch_ranks names text"):
        peft.get_peft_model(
            build("clip"), AuroraConfig(branches=["vision"], branch_ranks={"text": 4})
        )


def saved(tmp_path, config=None, backbone="clip"):
    model = peft.get_peft_model(build(backbone), config or AuroraConfig(rank=4))
    model.save_pretrained(tmp_path)
    return tmp_path


def test_adapter_of_another_backbone_is_refused(tmp_path):
    folder = saved(tmp_path)
    with pytest.raises(AdapterMismatchError, match="Only in the adapter: vision_model"):
        load_adapter(build("open_clip"), folder)


def test_adapter_of_another_size_is_refused_with_both_shapes(tmp_path):
    folder = saved(tmp_path)
    import json

    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"rank": 6}))
    model = build("clip")
    before = dict(model.named_modules())
    with pytest.raises(
        AdapterMismatchError, match=r"\[4, 48\] in the file, \[6, 48\] in the model"
    ):
        load_adapter(model, folder)
    assert set(dict(model.named_modules())) == set(before)


def test_missing_adapter_file_is_told(tmp_path):
    folder = saved(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(build("clip"), folder)


def test_methods_are_found_with_their_options():
    found = methods()
    assert {"aurora", "lora"} <= set(found)
    options = found["aurora"].options()
    assert options.rank == 64
    assert not hasattr(options, "peft_type")
    assert not hasattr(options, "adapted")
