"""The parts of the recipe of `tiny-llava`; `mmtune.zoo.train_tiny_llava` puts them together."""
