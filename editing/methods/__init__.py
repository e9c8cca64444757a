"""Editors: one file each, found by their EDITORS (see `editing.methods.base`)."""
