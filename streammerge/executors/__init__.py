"""Executors: each runs a plan's tasks in its own way; all give the same bytes."""
