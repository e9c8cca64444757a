"""Editors on records: reliability, generality, locality and portability, resumable, on one page."""
