"""Random bits: the same however they are cut, uniform, and independent of one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.draw import BLOCK, CHUNK, Drawer, keep_limit, random_bits, stream_key

KEY = stream_key(3, 1, "layers.0.q", "delta")
COUNT = 1 << 21
LAGS = (1, 2, 3, 4, 7, 8, 16, 64, 128, 1024, 4096, 65536)


def signs(key: int) -> np.ndarray:
    """A stream's bits at density 0.5 as ±1."""
    return 2.0 * (random_bits(key, 0, COUNT).numpy() < keep_limit(0.5)) - 1


@given(start=st.integers(0, 2**40), counts=st.lists(st.integers(1, 3000), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_stream_is_the_same_however_it_is_cut(start: int, counts: list[int]) -> None:
    whole = random_bits(KEY, start, sum(counts))
    edges = np.cumsum([0, *counts])
    parts = [random_bits(KEY, start + int(a), n) for a, n in zip(edges, counts, strict=False)]
    assert torch.equal(torch.cat(parts), whole)


def test_chunks_and_blocks_join() -> None:
    """A range over a chunk's end, and over the end of what 32 bits count."""
    for start, edge in ((0, CHUNK), (BLOCK - 3, BLOCK)):
        whole = random_bits(KEY, start, edge - start + 5)
        halves = random_bits(KEY, start, edge - start), random_bits(KEY, edge, 5)
        assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(random_bits(KEY, 0, 64), random_bits(KEY, BLOCK, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.999, 1 - 2**-34])
def test_a_mask_is_what_the_bits_say(density: float, dtype: torch.dtype) -> None:
    out = torch.empty(5000, dtype=dtype)
    Drawer(1024, out.device).mask(KEY, 77, density, out=out)
    assert torch.equal(out, (random_bits(KEY, 77, 5000) < keep_limit(density)).to(dtype))


def test_bits_are_uniform() -> None:
    """Chi-square over 4,096 bins, of the upper and of the lower bits."""
    bits = random_bits(KEY, 0, COUNT).numpy()
    assert 0 <= bits.min() < bits.max() < 2**32
    for part in (bits >> 20, bits & 4095):
        counts = np.bincount(part, minlength=4096)
        expected = COUNT / 4096
        assert abs(float(((counts - expected) ** 2 / expected).sum()) / 4095 - 1) < 0.12


def test_neighbours_are_independent() -> None:
    x = signs(KEY)
    worst = max(abs(float((x[lag:] * x[:-lag]).sum())) for lag in LAGS)
    assert worst < 5 * COUNT**0.5


@pytest.mark.parametrize("changed", [1, 2, 1 << 8, 1 << 31, 1 << 32, 1 << 33, 1 << 48])
def test_keys_of_nearly_the_same_bits_are_independent(changed: int) -> None:
    """What two adapters keep of the same element."""
    agreement = float((signs(KEY) * signs((KEY + changed) % 2**64)).sum())
    assert abs(agreement) < 6 * COUNT**0.5
