"""The floor of a merge's input and output: read and hash every byte, write as many as it writes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import xxhash

from benchmarks.inputs import weight_files
from benchmarks.processes import Figures, Job, answer

BLOCK = 2**23


def measure(job: Job, _: str) -> Figures:
    """Go over the inputs once and write the output once, with nothing in between."""
    # Not zeros, which some file systems do not store.
    block = os.urandom(BLOCK)
    began = time.perf_counter()
    for path in weight_files(job.adapters):
        digest = xxhash.xxh3_128()
        with path.open("rb", buffering=0) as stream:
            while data := stream.read(BLOCK):
                digest.update(data)
    read = time.perf_counter()
    with Path(job.output).open("wb", buffering=0) as stream:
        starts = range(0, job.write_bytes, BLOCK)
        stream.writelines(block[: job.write_bytes - start] for start in starts)
        os.fsync(stream.fileno())
    written = time.perf_counter()
    return {
        "read_seconds": read - began,
        "write_seconds": written - read,
        "whole_seconds": written - began,
    }


if __name__ == "__main__":
    answer(measure)
