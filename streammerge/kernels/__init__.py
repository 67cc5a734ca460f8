"""Streamed maths over "give me tile i" callables: merged tiles, thresholds, truncated SVDs."""
