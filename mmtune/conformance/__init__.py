"""What is claimed: every method on every backbone.

The test suite runs these rows, and `mmtune list --matrix` prints them.
"""
