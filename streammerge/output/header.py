"""The safetensors header of an output file, known before any tensor is computed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from streammerge.adapter import METADATA_KEY, PEFT, PLAIN_METADATA
from streammerge.plans import Plan, Region


def metadata_of(plan: Plan) -> dict[str, str]:
    """Return what stands in the header of each output file besides the tensors."""
    if plan.format == PEFT:
        return PLAIN_METADATA
    # Deterministic, as all of the output is.
    return PLAIN_METADATA | {METADATA_KEY: json.dumps(plan.config, sort_keys=True)}


def render_header(regions: Iterable[Region], metadata: Mapping[str, str] = PLAIN_METADATA) -> bytes:
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
