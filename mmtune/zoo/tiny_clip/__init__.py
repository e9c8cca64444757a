"""The parts of the recipe of `tiny-clip`; `mmtune.zoo.train_tiny_clip` puts them together."""
