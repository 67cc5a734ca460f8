"""Adapters trained on real data, merged by every method, and how well the merges do."""
