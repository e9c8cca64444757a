"""The stock networks of the recipe, as small as the zoo wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from mmtune.zoo.tiny_diffusion.recipe import DiffusionRecipe

FACTOR = 4  # edge of a picture / edge of its latent
GROUPS = 16  # of the norms
HEAD = 32  # width of an attention head
NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,  # the last step is noise alone: no grey shines through
}


def build_coder(recipe: DiffusionRecipe) -> AutoencoderKL:
    """A stock AutoencoderKL with random weights: [b, 3, s, s] <-> [b, channels, s / 4, s / 4]."""
    from diffusers import AutoencoderKL

    groups = min(GROUPS, recipe.coder_width)
    stock: Any = AutoencoderKL  # whose annotations say tuples of one
    return stock(
        block_out_channels=(recipe.coder_width, recipe.coder_deep, recipe.coder_deep),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=recipe.channels,
        norm_num_groups=groups,
        sample_size=recipe.size,
        mid_block_add_attention=False,
    )


def build_unet(recipe: DiffusionRecipe, text_width: int) -> UNet2DConditionModel:
    """A stock UNet2DConditionModel with random weights, which attends to texts at half size."""
    from diffusers import UNet2DConditionModel

    widths = (recipe.width, recipe.deep, recipe.deep)
    stock: Any = UNet2DConditionModel
    return stock(
        sample_size=recipe.size // FACTOR,
        in_channels=recipe.channels,
        out_channels=recipe.channels,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        # The name is that of SD's configs; it is the number of heads.
        attention_head_dim=[max(1, width // HEAD) for width in widths],
        cross_attention_dim=text_width,
        norm_num_groups=min(GROUPS, recipe.width),
        use_linear_projection=True,
        dropout=recipe.dropout,
    )


def training_noise() -> Any:
    """The DDPMScheduler whose steps are trained."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(**NOISE, clip_sample=False)


def sampling_noise() -> Any:
    """The scheduler that ships: DPM-Solver++ of second order."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(**NOISE, timestep_spacing="trailing", steps_offset=1)
