"""Edits of multimodal language models: applied, measured and undone."""
