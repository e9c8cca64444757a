"""CLIP's towers computed step by step from a list of vectors, in float64."""

import torch
from torch import nn

CONTEXT, VOCABULARY = 77, 60
VISION = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 48, "head_width": 16}
TEXT = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2}


def open_clip():
    from open_clip.model import CLIP

    return CLIP(24, VISION, TEXT)


def clip():
    from transformers import CLIPConfig, CLIPModel

    text = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": VOCABULARY - 1,
        "hidden_act": "gelu",
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": "gelu",
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))


BOTH = {"open_clip": open_clip, "clip": clip}


def made(name):
    """A frozen model with 77 tokens of context, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BOTH[name]().double().eval().requires_grad_(False)
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def texts(lengths, seed=0):
    """Ids [n, 77]: begin, words, end, then zeros; `lengths` counts begin and end."""
    ids = torch.randint(2, VOCABULARY - 1, (len(lengths), CONTEXT), generator=_draws(seed))
    for row, length in zip(ids, lengths, strict=True):
        row[0], row[length - 1], row[length:] = 1, VOCABULARY - 1, 0
    return ids


def images(n, seed=0):
    return torch.randn(n, 3, 32, 32, generator=_draws(seed), dtype=torch.float64)


def _draws(seed):
    return torch.Generator().manual_seed(seed)


def words(model, row):
    """The vectors of one text, token and position embeddings added: [77, d]."""
    if hasattr(model, "text_model"):
        e = model.text_model.embeddings
        return e.token_embedding.weight[row] + e.position_embedding.weight
    return model.token_embedding.weight[row] + model.positional_embedding


def patches(model, image):
    """The vectors of one image behind the first norm, the class token ahead: [17, d]."""
    if hasattr(model, "vision_model"):
        e = model.vision_model.embeddings
        kernel, first, places = e.patch_embedding, e.class_embedding, e.position_embedding.weight
        norm = model.vision_model.pre_layrnorm
    else:
        v = model.visual
        kernel, first, places, norm = v.conv1, v.class_embedding, v.positional_embedding, v.ln_pre
    size = kernel.kernel_size[0]
    cut = image.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(2)
    projected = cut.flatten(0, 1) @ kernel.weight.flatten(1).T
    return norm(torch.cat([first[None], projected]) + places)


def pooled(view, branch, sequence, index):
    """The unit embedding that a tower gives for vectors [n, d], read at `index`."""
    x, n = sequence, len(sequence)
    layers = sorted({s.layer for s in view.select([branch], ["q"])})
    for layer in layers:
        sites = {s.role: s.module for s in view.select([branch], None, [layer]) if s.role != "norm"}
        before, after = (s.module for s in view.select([branch], ["norm"], [layer]))
        q, k, v = (_heads(sites[r](before(x)), 16) for r in "qkv")
        scores = q @ k.transpose(1, 2) / 4
        if branch == "text":
            scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + sites["out"](mixed)
        x = x + sites["fc2"](nn.functional.gelu(sites["fc1"](after(x))))
    last = [s.module for s in view.select([branch], ["norm"]) if s.layer is None][-1]
    e = _projected(view.model, branch, last(x[index]))
    return e / e.norm()


def _heads(x, width):
    return x.unflatten(-1, (-1, width)).transpose(0, 1)


def _projected(model, branch, x):
    if hasattr(model, "text_model"):
        return (model.visual_projection if branch == "vision" else model.text_projection)(x)
    return x @ (model.visual.proj if branch == "vision" else model.text_projection)


def spliced(sequence, tokens, at):
    """Vectors [n, d] with tokens[j] put in before sequence[at[j]]."""
    rows = []
    for i in range(len(sequence) + 1):
        rows += [tokens[j] for j, k in enumerate(at) if min(k, len(sequence)) == i]
        rows += [sequence[i]] if i < len(sequence) else []
    return torch.stack(rows)
