"""Formats: each reader is one function from headers to a manifest; none of them computes."""

from streammerge.readers.adapters import read_adapter, read_adapters

__all__ = ["read_adapter", "read_adapters"]
