"""The parts of the recipe of `tiny-diffusion`; `mmtune.zoo.train_tiny_diffusion` joins them."""
