"""The parts of the recipe of `tiny-blip`; `mmtune.zoo.train_tiny_blip` puts them together."""
