"""Readers of raw collections, one file each."""
