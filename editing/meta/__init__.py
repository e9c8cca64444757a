"""Editors that must be trained before they edit: what they share, and their training."""
