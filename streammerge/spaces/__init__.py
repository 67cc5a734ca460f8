"""Spaces: what a rule is applied to. One file and one pure function each."""
