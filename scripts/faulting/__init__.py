"""Merges under which the file system fails."""
