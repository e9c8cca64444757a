"""Builders of data sets: sources, splits, and the commands that make what ships."""
