"""LoRA through sites."""

import peft
import pytest
import torch

from mmtune import load_adapter, lora_config
from mmtune.backbones import SiteError
from mmtune.conformance.backbones import build
from mmtune.tuners.sited import AdapterMismatchError


def adapted(model):
    return [n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)]


def test_open_clip_text_alone_leaves_vision_untouched():
    """PEFT matches a plain path as a suffix, and a text path is a suffix of a vision path."""
    model = build("open_clip")
    wrapped = peft.get_peft_model(model, lora_config(model, branches=["text"], sites=["q"]))
    assert len(adapted(wrapped)) == 2
    assert all("visual" not in n for n in adapted(wrapped))


@pytest.mark.parametrize("backbone", ["clip", "open_clip"])
@pytest.mark.parametrize("branch", ["text", "vision"])
def test_branch_ranks(backbone, branch):
    model = build(backbone)
    config = lora_config(model, rank=2, branch_ranks={branch: 5}, sites=["q"])
    wrapped = peft.get_peft_model(model, config)
    ranks = {
        ("vision" if "vis" in n else "text", m.r["default"])
        for n, m in wrapped.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }
    assert ranks == {("text", 2), ("vision", 2)} - {(branch, 2)} | {(branch, 5)}


def test_dropout_is_real_on_split_attention():
    """On nn.MultiheadAttention PEFT ignores it; on q it acts."""
    model = build("open_clip")
    wrapped = peft.get_peft_model(model, lora_config(model, dropout=0.5, sites=["q"])).train()
    for n, p in wrapped.named_parameters():
        if "lora_B" in n:
            p.data.normal_()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(wrapped.encode_image(x), wrapped.encode_image(x))


def test_other_layers_are_refused():
    with pytest.raises(SiteError, match="LayerNorm"):
        lora_config(build("clip"), sites=["norm"])


def test_adapter_of_another_backbone_is_refused(tmp_path):
    model = build("clip")
    peft.get_peft_model(model, lora_config(model)).save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match="another backbone"):
        load_adapter(build("open_clip"), tmp_path)
