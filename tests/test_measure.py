"""`streammerge.measure` and `inspect --norms`, against the dense delta."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import streammerge
from dialects import pairs, write_mlx
from making import PREFIX, WEIGHTS, convolution, embedding, linear, write_adapter
from streammerge.cli import main

LAYERS = {
    "layers.0.q_proj": linear(96, 64, 8),
    "layers.0.small": linear(5, 64, 8),
    "words": embedding(40, 300, 4),
    "conv": convolution(12, 6, (3, 3), 4),
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "in", LAYERS, lora_alpha=24)


def dense(path: Path, target: str) -> np.ndarray:
    """B·A of a target in float64."""
    tensors = load_file(path / WEIGHTS)
    names = sorted(name for name in tensors if name.startswith(f"{PREFIX}{target}."))
    a, b = (tensors[name].astype(np.float64) for name in names)
    return b.reshape(len(b), -1)[:, : len(a)] @ a.reshape(len(a), -1)


def test_against_the_dense_delta(adapter: Path) -> None:
    measured = streammerge.measure(adapter)
    assert measured.scaled
    total = 0.0
    for found in measured.targets:
        s = np.linalg.svd(3.0 * dense(adapter, found.target), compute_uv=False)
        if found.rank == 4:  # rank_pattern, so that alpha/r is another
            s *= 2.0
        energy = s**2
        share = energy[energy > 0] / energy.sum()
        assert found.norm == pytest.approx(np.sqrt(energy.sum()), rel=1e-6)
        assert found.largest == pytest.approx(s[0], rel=1e-6)
        assert found.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()))
        assert found.stable_rank == pytest.approx(energy.sum() / energy[0])
        assert found.numerical_rank == min(found.rank, *dense(adapter, found.target).shape)
        total += energy.sum()
    assert measured.norm == pytest.approx(np.sqrt(total))


def test_many_tiles(tmp_path: Path) -> None:
    """Factors that are gone over in several blocks of rows."""
    path = write_adapter(tmp_path / "in", {"up": linear(30_000, 40_000, 32)}, lora_alpha=32)
    (found,) = streammerge.measure(path).targets
    tensors = load_file(path / WEIGHTS)
    a, b = (tensors[f"{PREFIX}up.lora_{side}.weight"].astype(np.float64) for side in "AB")
    assert found.norm == pytest.approx(np.sqrt(np.vdot(b.T @ b, a @ a.T)), rel=1e-6)


def spoil(path: Path, **changed: np.ndarray) -> None:
    tensors = load_file(path / WEIGHTS)
    for side, values in changed.items():
        tensors[f"{PREFIX}layers.0.q_proj.lora_{side}.weight"] = values
    save_file(tensors, path / WEIGHTS)


def test_what_is_odd(adapter: Path) -> None:
    a = np.ones((8, 64), np.float32)
    spoil(adapter, A=a)
    rank_one = {m.target: m for m in streammerge.measure(adapter).targets}["layers.0.q_proj"]
    assert (rank_one.numerical_rank, rank_one.rank) == (1, 8)
    assert rank_one.effective_rank == pytest.approx(1.0)
    spoil(adapter, B=np.zeros((96, 8), np.float32))
    zero = {m.target: m for m in streammerge.measure(adapter).targets}["layers.0.q_proj"]
    assert (zero.norm, zero.numerical_rank, zero.effective_rank, zero.stable_rank) == (0, 0, 0, 0)
    a[3, 5] = np.nan
    spoil(adapter, A=a)
    measured = streammerge.measure(adapter)
    (odd,) = (m for m in measured.targets if m.problem)
    assert "lora_A.weight holds NaN" in odd.problem
    assert np.isnan(odd.norm)
    assert np.isfinite(measured.norm)
    shown = CliRunner().invoke(main, ["inspect", str(adapter), "--norms"])
    assert shown.exit_code == 0
    assert "holds NaN" in shown.output
    told = json.loads(
        CliRunner().invoke(main, ["inspect", str(adapter), "--norms", "--json"]).stdout
    )
    assert [m["norm"] for m in told[0]["spectra"] if m["problem"]] == [None]
    assert len(told[0]["spectra"]) == len(LAYERS)


def test_an_unknown_scaling(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "in", {"up": linear(8, 8, 2)})
    (path / "adapter_config.json").unlink()
    measured = streammerge.measure(path)
    assert not measured.scaled
    assert measured.norm == pytest.approx(np.linalg.norm(dense(path, "up")))
    shown = CliRunner().invoke(main, ["inspect", str(path), "--norms"])
    assert "the scaling is unknown" in shown.output


def test_factors_that_lie_transposed(tmp_path: Path) -> None:
    made = pairs({"model.layers.0.q_proj": (40, 24, 4)}, scaling=3.0)
    (found,) = streammerge.measure(write_mlx(tmp_path / "in", made, 4, 3.0)).targets
    (pair,) = made.values()
    assert found.norm == pytest.approx(np.linalg.norm(pair.delta), rel=1e-6)


def test_the_table_names_the_largest(adapter: Path) -> None:
    shown = CliRunner().invoke(main, ["inspect", str(adapter), "--norms"]).output
    measured = streammerge.measure(adapter)
    largest = max(measured.targets, key=lambda m: m.norm)
    _, _, after = shown.partition("share of energy")
    assert after.splitlines()[1].split()[0] == largest.target
    assert f"{measured.norm:.4g} of all deltas" in shown
