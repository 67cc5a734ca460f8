"""Merges that are killed at random moments."""
