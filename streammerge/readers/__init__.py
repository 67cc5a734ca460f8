"""Formats: each reader is one function from a directory to a manifest; none of them computes."""

from streammerge.readers.peft import read_adapter, read_adapters

__all__ = ["read_adapter", "read_adapters"]
