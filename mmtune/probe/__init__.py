"""Comparing multimodal language models: prompt styles x abilities."""
