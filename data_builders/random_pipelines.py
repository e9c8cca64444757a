"""Text-to-image pipelines of diffusers' stock classes with random weights: they draw noise.

"random:sd21" has the size of Stable Diffusion 2.1, to be timed; the tiny ones run the code path of
their class in tests. Nothing that they draw is a result.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def pipelines() -> dict[str, Callable[[], Any]]:
    """What there is: the part of a name after "random:" -> what makes it, in the default dtype."""
    return {"sd21": _sd21, "tiny-sd": _tiny_sd, "tiny-sdxl": _tiny_sdxl, "tiny-sd3": _tiny_sd3}


def _library(name: str) -> Any:
    """A module as it is: what it declares about its own classes is too narrow for their configs."""
    return import_module(name)


def _sd21() -> Any:
    """The sizes in the configs of stabilityai/stable-diffusion-2-1."""
    diffusers = _library("diffusers")
    transformers = _library("transformers")

    from mmtune.backbones.architectures import ARCHITECTURES

    tokenizer = ARCHITECTURES["clip-vit-large-patch14"]().tokenizer()
    tokenizer.model_max_length = 77
    text = transformers.CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
        **_ends(tokenizer),
    )
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=768,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=96,
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        ),
        scheduler=diffusers.DDIMScheduler(
            **NOISE,
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _ends(tokenizer: Any) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def _tokenizer() -> Any:
    """A real one of few words: tiny-clip's."""
    transformers = _library("transformers")

    from mmtune.zoo import model_path

    return transformers.CLIPTokenizer.from_pretrained(str(model_path("tiny-clip")))


def _text(tokenizer: Any) -> Any:
    transformers = _library("transformers")

    return transformers.CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        **_ends(tokenizer),
    )


def _vae(**options: Any) -> Any:
    diffusers = _library("diffusers")

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=32,
        **options,
    )


def _unet(**options: Any) -> Any:
    diffusers = _library("diffusers")

    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        norm_num_groups=2,
        sample_size=16,
        use_linear_projection=True,
        **options,
    )


def _tiny_sd() -> Any:
    diffusers = _library("diffusers")
    transformers = _library("transformers")

    tokenizer = _tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=transformers.CLIPTextModel(_text(tokenizer)),
        tokenizer=tokenizer,
        unet=_unet(cross_attention_dim=32),
        scheduler=diffusers.DDIMScheduler(
            **NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _tiny_sdxl() -> Any:
    diffusers = _library("diffusers")
    transformers = _library("transformers")

    tokenizer = _tokenizer()
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=transformers.CLIPTextModel(_text(tokenizer)),
        text_encoder_2=transformers.CLIPTextModelWithProjection(_text(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_unet(
            cross_attention_dim=64,  # of both text encoders
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
            transformer_layers_per_block=(1, 1),
        ),
        # Turbo's: it draws noise in every step.
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**NOISE, timestep_spacing="trailing"),
        add_watermarker=False,
    )


def _tiny_sd3() -> Any:
    diffusers = _library("diffusers")
    transformers = _library("transformers")

    tokenizer = _tokenizer()
    t5 = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=64,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0609,
            scaling_factor=1.5305,
        ),
        text_encoder=transformers.CLIPTextModelWithProjection(_text(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=transformers.CLIPTextModelWithProjection(_text(tokenizer)),
        tokenizer_2=tokenizer,
        text_encoder_3=transformers.T5EncoderModel(t5),
        tokenizer_3=tokenizer,
    )
