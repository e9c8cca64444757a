"""What the tests of BLIP share."""

import torch

from mmtune.backbones import backbone_of
from mmtune.conformance.backbones import BACKBONES, build

NAMES = ("blip-retrieval", "blip-vqa", "blip-caption")
BRANCHES = {
    "blip-retrieval": ("vision", "text", "fusion"),
    "blip-vqa": ("vision", "text", "fusion", "language"),
    "blip-caption": ("vision", "language"),
}


def prepared(name):
    view = backbone_of(build(name))
    view.prepare()
    return view


def outputs(model, view, name, seed=0):
    return BACKBONES[name].outputs(model, view, BACKBONES[name].batch(seed, 3))


def close(found, want, tolerance=1e-5):
    return (found - want).abs().max() <= tolerance * want.abs().max()


def generated(model, name, **options):
    """Words [b, t] and their logits [t, b, n] for a padded batch."""
    batch = BACKBONES[name].batch(0, 3)
    keys = ("pixel_values", "input_ids", "attention_mask")[: 3 if name == "blip-vqa" else 1]
    written = model.generate(
        **{k: batch[k] for k in keys},
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return written.sequences, torch.stack(written.logits)
