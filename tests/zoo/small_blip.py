"""A BLIP of the zoo's layout with random weights, small enough for a test."""

import torch

from mmtune.zoo.blip import save_blip
from mmtune.zoo.tiny_blip.model import TinyBlip, blip_config
from mmtune.zoo.tiny_blip.recipe import BlipRecipe
from mmtune.zoo.tiny_blip.tokenizer import train_tokenizer

TEXTS = [
    "a red hat",
    "blue triangle, shape",
    "is there not a blue triangle in the image?",
    "what color is the circle?",
    "yes",
    "no",
    "gray",
]
RECIPE = BlipRecipe(
    vocab_size=220,
    context=16,
    image_size=32,
    patch_size=8,
    vision_width=32,
    vision_layers=2,
    vision_heads=2,
    text_width=32,
    text_layers=2,
    text_heads=2,
    embed=16,
    start="",
    batch=6,
    mixed=2,
    vqa_images=3,
    vqa_asked=2,
    teacher_size=32,
)


def small_model(seed=0):
    """Weights large enough that pictures and words matter, and exact in half precision."""
    torch.manual_seed(seed)
    model = TinyBlip(blip_config(RECIPE)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.data = parameter.data.half().float()
    return model


def write(folder, seed=0):
    model = small_model(seed)
    train_tokenizer(TEXTS * 3, RECIPE.vocab_size, folder, RECIPE.context)
    save_blip(model.tensors(), model.config, folder)
    return model
