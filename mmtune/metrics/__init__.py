"""Metrics of the tasks, each checked against golden numbers."""
