"""The safetensors header of an output file, known before any tensor is computed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from streammerge.plans import Region

FORMAT = {"format": "pt"}


def render_header(regions: Iterable[Region], metadata: Mapping[str, str] = FORMAT) -> bytes:
    """Return the length field and the JSON header for a file with these regions.

    The JSON is filled up with spaces so that the data begin at a multiple of eight bytes, as the
    format recommends.

    Args:
        regions: in the order in which they are named.
        metadata: what the file says of itself; what PEFT writes, unless it is given.
    """
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    for region in regions:
        fields[region.name] = {
            "dtype": region.dtype,
            "shape": region.shape,
            "data_offsets": (region.offset, region.offset + region.nbytes),
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
