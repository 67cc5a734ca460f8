"""Where PEFT 0.21.2 is wrong or silent: what it does, pinned, and what streammerge does instead.

Each row of docs/peft-differences.md names a test of this file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import streammerge
from oracle import cases, restated
from oracle import peft_oracle as peft
from oracle.cases import AdapterSpec, Setting
from oracle.files import random_source, write_adapter
from oracle.restated import Source
from streammerge import errors, events

CLOSE = 1e-5
RANK = 3
TWO = peft.linear_layers(first=(10, 14), second=(13, 9))
PAIR = (1.0, -0.5)
KINDS_WITHOUT_SVD = [name for name, kind in peft.KINDS.items() if not kind.peft_has_svd]


def save_pair(
    place: Path, layers: peft.Layers, first: dict[str, Any], second: dict[str, Any]
) -> list[Path]:
    """Two adapters of rank 3, alpha 6, each with its own further options."""
    return [
        peft.save_adapter(
            place / f"source{i}", layers, seed=i, **({"r": RANK, "lora_alpha": 6} | more)
        )
        for i, more in enumerate((first, second))
    ]


def merge_in_peft(
    layers: peft.Layers,
    directories: Sequence[Path],
    method: str,
    weights: Sequence[float] = PAIR,
    **options: Any,
) -> peft.PeftMerge:
    """PEFT's merge of saved adapters."""
    return peft.merge(peft.load_adapters(layers, directories), weights, method, **options)


def merge_files(
    directories: Sequence[Path],
    output: Path,
    method: str,
    weights: Sequence[float] = PAIR,
    **options: Any,
) -> dict[str, peft.SavedTarget]:
    """streammerge's merge of the same files, read back."""
    streammerge.merge(
        directories, output, method=method, weights=weights, on_event=events.ignore, **options
    )
    return peft.read_adapter(output)


def expected_deltas(
    directories: Sequence[Path], method: str, weights: Sequence[float] = PAIR, **options: Any
) -> dict[str, restated.Matrix]:
    """The restated B A of each target: before truncation for the `*svd` methods."""
    deltas = {}
    for target, here in cases.saved_sources(directories).items():
        kept = [weights[position] for position in here.positions]
        if method in restated.DELTA_METHODS:
            deltas[target] = restated.merge_delta(method, here.sources, kept, **options)
        else:
            a, b = restated.merge_factors(method, here.sources, kept, **options)
            deltas[target] = b @ a
    return deltas


def assert_deltas(
    found: dict[str, peft.SavedTarget],
    expected: dict[str, restated.Matrix],
    *,
    rank: int | None = None,
) -> None:
    """Every target is there and right, or as near as its rank allows."""
    assert found.keys() == expected.keys()
    for target, delta in expected.items():
        best = delta if rank is None else restated.best_rank(delta, rank)
        assert peft.relative_error(found[target].delta, best) < 10 * CLOSE


class TestScaling:
    """The scaling of the result."""

    METHODS = ("cat", "linear", "svd", "ties", "ties_svd", "magnitude_prune")

    @pytest.mark.parametrize("method", METHODS)
    def test_first_adapter_is_rslora(self, method: str, tmp_path: Path) -> None:
        """PEFT hands rslora on to the result, which then runs sqrt(R) too large."""
        directories = save_pair(tmp_path, TWO, {"use_rslora": True}, {"lora_alpha": 4})
        options = {"density": 0.5} if restated.uses_density(method) else {}
        expected = expected_deltas(directories, method, **options)
        theirs = merge_in_peft(TWO, directories, method, **options)
        rank = RANK if method in restated.DELTA_METHODS else None
        for target, delta in expected.items():
            best = delta if rank is None else restated.best_rank(delta, rank)
            too_large = math.sqrt(2 * RANK if method == "cat" else RANK)
            assert peft.relative_error(theirs.delta(target), too_large * best) < 10 * CLOSE
        ours = merge_files(directories, tmp_path / "out", method, **options)
        assert_deltas(ours, expected, rank=rank)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["use_rslora"] is False

    def test_second_adapter_is_rslora(self, tmp_path: Path) -> None:
        """Only the first adapter's flag does it: in this order PEFT is right."""
        directories = save_pair(tmp_path, TWO, {"lora_alpha": 4}, {"use_rslora": True})
        expected = expected_deltas(directories, "cat")
        theirs = merge_in_peft(TWO, directories, "cat")
        for target, delta in expected.items():
            assert peft.relative_error(theirs.delta(target), delta) < CLOSE
        assert_deltas(merge_files(directories, tmp_path / "out", "cat"), expected)


class TestRanks:
    """Ranks that differ between modules."""

    @pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
    def test_rank_pattern_with_a_factor_rule(self, method: str, tmp_path: Path) -> None:
        """PEFT clears rank_pattern, so what it saves does not load again."""
        pattern = {"rank_pattern": {"second": 2}}
        directories = save_pair(tmp_path, TWO, pattern, pattern)
        options = {"density": 0.5} if restated.uses_density(method) else {}
        theirs = merge_in_peft(TWO, directories, method, **options)
        theirs.model.save_pretrained(
            tmp_path / "theirs", selected_adapters=[peft.MERGED], save_embedding_layers=False
        )
        with pytest.raises(RuntimeError, match=r"size mismatch for .*second"):
            peft.load_adapters(TWO, [tmp_path / "theirs" / peft.MERGED])
        ours = merge_files(directories, tmp_path / "out", method, **options)
        assert_deltas(ours, expected_deltas(directories, method, **options))
        layers = peft.lora_layers(peft.load_adapters(TWO, [tmp_path / "out"]))
        assert {target: layer.r["a0"] for target, layer in layers.items()} == {
            "first": 3,
            "second": 2,
        }

    def test_factor_rule_on_unequal_ranks_of_one_module(self, tmp_path: Path) -> None:
        """PEFT compares only the largest ranks, and falls over a torch.stack."""
        directories = save_pair(
            tmp_path, TWO, {"rank_pattern": {"second": 2}}, {"rank_pattern": {"second": 1}}
        )
        with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
            merge_in_peft(TWO, directories, "linear")
        with pytest.raises(errors.IncompatibleError, match="svd") as refused:
            merge_files(directories, tmp_path / "out", "linear")
        assert refused.value.target == "second"

    def test_rank_above_a_tall_module(self, tmp_path: Path) -> None:
        """PEFT multiplies an m x R by a min(m, n) square."""
        layers = peft.linear_layers(first=(14, 2), second=(13, 9))
        directories = save_pair(tmp_path, layers, {}, {})
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            merge_in_peft(layers, directories, "svd")
        self._check_clamped(layers, directories, tmp_path / "out")

    def test_rank_above_a_wide_module(self, tmp_path: Path) -> None:
        """PEFT makes an A of R rows and a B of min(m, n) columns."""
        layers = peft.linear_layers(first=(2, 14), second=(13, 9))
        directories = save_pair(tmp_path, layers, {}, {})
        model = peft.load_adapters(layers, directories)
        model.add_weighted_adapter(["a0", "a1"], list(PAIR), peft.MERGED, combination_type="svd")
        a, b = peft.factors_of(peft.lora_layers(model)["first"], peft.MERGED)
        assert (a.shape, b.shape) == ((3, 14), (2, 2))
        self._check_clamped(layers, directories, tmp_path / "out")

    @staticmethod
    def _check_clamped(layers: peft.Layers, directories: list[Path], output: Path) -> None:
        ours = merge_files(directories, output, "svd")
        assert {target: found.rank for target, found in ours.items()} == {"first": 2, "second": 3}
        expected = expected_deltas(directories, "svd")
        assert peft.relative_error(ours["first"].delta, expected["first"]) < CLOSE
        best = restated.best_rank(expected["second"], 3)
        assert peft.relative_error(ours["second"].delta, best) < 10 * CLOSE
        config = json.loads((output / "adapter_config.json").read_text())
        assert config["rank_pattern"] == config["alpha_pattern"] == {"first": 2}
        assert len(peft.lora_layers(peft.load_adapters(layers, [output]))) == 2

    def test_cat_pads_with_zeros(self, tmp_path: Path) -> None:
        """PEFT gives each module the sum of all ranks, also of adapters that lack it."""
        directories = save_pair(tmp_path, TWO, {"target_modules": ["first"]}, {"r": 2})
        theirs = merge_in_peft(TWO, directories, "cat")
        a, b = theirs.factors["second"]
        assert a.shape[0] == 5
        assert not a[2:].any()
        assert not b[:, 2:].any()
        ours = merge_files(directories, tmp_path / "out", "cat")
        assert {target: found.rank for target, found in ours.items()} == {"first": 5, "second": 2}
        assert_deltas(ours, expected_deltas(directories, "cat"))


class TestModules:
    """Which modules the result has."""

    FOUR = staticmethod(
        peft.linear_layers(
            layers__0__q=(10, 14), layers__0__v=(8, 14), layers__1__q=(10, 14), layers__1__v=(8, 14)
        )
    )

    @pytest.mark.parametrize("method", ["cat", "linear", "svd"])
    def test_exclude_modules_of_the_first_adapter(self, method: str, tmp_path: Path) -> None:
        first = {"target_modules": ["first"], "exclude_modules": ["second"]}
        directories = save_pair(tmp_path, TWO, first, {})
        assert set(merge_in_peft(TWO, directories, method).factors) == {"first"}
        expected = expected_deltas(directories, method)
        assert expected.keys() == {"first", "second"}
        rank = RANK if method == "svd" else None
        assert_deltas(merge_files(directories, tmp_path / "out", method), expected, rank=rank)

    @pytest.mark.parametrize("method", ["cat", "linear", "svd"])
    def test_layers_to_transform_of_the_first_adapter(self, method: str, tmp_path: Path) -> None:
        first, second = (
            {"target_modules": ["q"], "layers_to_transform": [i], "layers_pattern": "layers"}
            for i in (0, 1)
        )
        directories = save_pair(tmp_path, self.FOUR, first, second)
        assert set(merge_in_peft(self.FOUR, directories, method).factors) == {"layers.0.q"}
        expected = expected_deltas(directories, method)
        assert expected.keys() == {"layers.0.q", "layers.1.q"}
        rank = RANK if method == "svd" else None
        assert_deltas(merge_files(directories, tmp_path / "out", method), expected, rank=rank)

    @pytest.mark.parametrize(
        ("method", "error"), [("cat", ValueError), ("linear", IndexError), ("svd", ValueError)]
    )
    def test_a_module_that_no_adapter_has(
        self, method: str, error: type[Exception], tmp_path: Path
    ) -> None:
        """PEFT takes the product of all modules with the first adapter's layers."""
        layers = {"layers_pattern": "layers"}
        directories = save_pair(
            tmp_path,
            self.FOUR,
            {"target_modules": ["q"], "layers_to_transform": [0, 1], **layers},
            {"target_modules": ["v"], "layers_to_transform": [0], **layers},
        )
        with pytest.raises(error):
            merge_in_peft(self.FOUR, directories, method)
        expected = expected_deltas(directories, method)
        assert expected.keys() == {"layers.0.q", "layers.1.q", "layers.0.v"}
        rank = RANK if method == "svd" else None
        assert_deltas(merge_files(directories, tmp_path / "out", method), expected, rank=rank)

    def test_target_modules_as_regex_and_as_list(self, tmp_path: Path) -> None:
        directories = save_pair(tmp_path, TWO, {"target_modules": "first|second"}, {})
        with pytest.raises(ValueError, match="should follow the same target modules type"):
            merge_in_peft(TWO, directories, "svd")
        ours = merge_files(directories, tmp_path / "out", "svd")
        assert_deltas(ours, expected_deltas(directories, "svd"), rank=RANK)

    def test_modules_of_some_adapters_are_pointed_out(self, tmp_path: Path) -> None:
        """Neither takes a missing module for anything but zero; PEFT says nothing about it."""
        directories = save_pair(tmp_path, TWO, {}, {"target_modules": ["first"]})
        theirs = merge_in_peft(TWO, directories, "cat")
        with pytest.warns(match=r"1 of 2 targets are not in all adapters \(such as second\)"):
            streammerge.merge(directories, tmp_path / "out", method="cat", weights=PAIR)
        ours = peft.read_adapter(tmp_path / "out")
        for target in ("first", "second"):
            assert peft.relative_error(ours[target].delta, theirs.delta(target)) < CLOSE


class TestOneAdapter:
    """PEFT turns every method on a single adapter into `linear`."""

    def test_svd_compresses(self, tmp_path: Path) -> None:
        directories = save_pair(tmp_path, TWO, {}, {})[:1]
        theirs = merge_in_peft(TWO, directories, "svd", [2.0], svd_rank=1)
        ours = merge_files(directories, tmp_path / "out", "svd", [2.0], rank=1)
        for target, delta in expected_deltas(directories, "svd", [2.0]).items():
            assert theirs.factors[target][0].shape[0] == 3
            assert ours[target].rank == 1
            best = restated.best_rank(delta, 1)
            assert peft.relative_error(ours[target].delta, best) < 10 * CLOSE

    @pytest.mark.parametrize("method", ["magnitude_prune", "ties", "magnitude_prune_svd"])
    def test_density_prunes(self, method: str, tmp_path: Path) -> None:
        directories = save_pair(tmp_path, TWO, {}, {})[:1]
        theirs = merge_in_peft(TWO, directories, method, [1.0], density=0.3)
        for target, delta in expected_deltas(directories, "cat", [1.0]).items():
            assert peft.relative_error(theirs.delta(target), delta) < CLOSE
        more = {"rank": 10} if method in restated.DELTA_METHODS else {}
        ours = merge_files(directories, tmp_path / "out", method, [1.0], density=0.3, **more)
        for target, delta in expected_deltas(directories, method, [1.0], density=0.3).items():
            assert peft.relative_error(ours[target].delta, delta) < CLOSE

    def test_an_unknown_method_is_refused(self, tmp_path: Path) -> None:
        directories = save_pair(tmp_path, TWO, {}, {})[:1]
        theirs = merge_in_peft(TWO, directories, "nonsense", [1.0])
        for target, delta in expected_deltas(directories, "cat", [1.0]).items():
            assert peft.relative_error(theirs.delta(target), delta) < CLOSE
        with pytest.raises(errors.RecipeError) as refused:
            merge_files(directories, tmp_path / "out", "nonsense", [1.0])
        assert refused.value.option == "method"


class TestArguments:
    """Arguments that PEFT does not check."""

    @pytest.fixture
    def directories(self, tmp_path: Path) -> list[Path]:
        return save_pair(tmp_path, TWO, {}, {})

    @staticmethod
    def assert_refused(
        directories: list[Path], output: Path, method: str, option: str, **options: Any
    ) -> None:
        """streammerge names the option and writes nothing."""
        with pytest.raises(errors.RecipeError) as refused:
            streammerge.merge(directories, output, method=method, **options)
        assert refused.value.option == option
        assert not output.exists()

    @pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
    def test_dare_of_density_nothing(
        self, method: str, directories: list[Path], tmp_path: Path
    ) -> None:
        """0/0 in PEFT, whose docstring says that everything is pruned."""
        theirs = merge_in_peft(TWO, directories, method, density=0.0)
        assert all(np.isnan(a).all() and np.isnan(b).all() for a, b in theirs.factors.values())
        ours = merge_files(directories, tmp_path / "out", method, density=0.0)
        assert all(not found.a.any() and not found.b.any() for found in ours.values())

    @pytest.mark.parametrize("method", ["dare_linear_svd", "dare_ties_svd"])
    def test_dare_in_delta_space_of_density_nothing(
        self, method: str, directories: list[Path], tmp_path: Path
    ) -> None:
        with pytest.raises(torch.linalg.LinAlgError, match="non-finite values"):
            merge_in_peft(TWO, directories, method, density=0.0)
        ours = merge_files(directories, tmp_path / "out", method, density=0.0)
        assert all(not found.delta.any() for found in ours.values())

    def test_missing_density(self, directories: list[Path], tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="'>=' not supported"):
            merge_in_peft(TWO, directories, "ties")
        self.assert_refused(directories, tmp_path / "out", "ties", "density")

    def test_density_above_one(self, directories: list[Path], tmp_path: Path) -> None:
        """PEFT warns once for each tensor of each adapter, and prunes nothing."""
        with pytest.warns(UserWarning, match="no pruning will be performed") as warned:
            theirs = merge_in_peft(TWO, directories, "magnitude_prune", density=20)
        assert len(warned) == 8
        for target, delta in expected_deltas(directories, "linear").items():
            assert peft.relative_error(theirs.delta(target), delta) < CLOSE
        self.assert_refused(directories, tmp_path / "out", "ties", "density", density=20)

    def test_density_not_a_number(self, directories: list[Path], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot convert float NaN to integer"):
            merge_in_peft(TWO, directories, "ties", density=math.nan)
        self.assert_refused(directories, tmp_path / "out", "ties", "density", density=math.nan)

    def test_too_few_weights(self, directories: list[Path], tmp_path: Path) -> None:
        """PEFT leaves the last adapter out, and its rank as zeros."""
        model = peft.load_adapters(TWO, directories)
        theirs = peft.merge(model, [2.0], "cat", adapters=["a0", "a1"])
        for target, delta in expected_deltas(directories[:1], "cat", [2.0]).items():
            assert theirs.factors[target][0].shape[0] == 6
            assert peft.relative_error(theirs.delta(target), delta) < CLOSE
        self.assert_refused(directories, tmp_path / "out", "cat", "weights", weights=[2.0])

    def test_weight_not_a_number(self, directories: list[Path], tmp_path: Path) -> None:
        theirs = merge_in_peft(TWO, directories, "cat", [1.0, math.nan])
        assert all(np.isnan(a).any() for a, _ in theirs.factors.values())
        self.assert_refused(
            directories, tmp_path / "out", "cat", "weights", weights=[1.0, math.nan]
        )

    def test_method_that_only_ends_in_svd(self, directories: list[Path], tmp_path: Path) -> None:
        """PEFT lets it through and returns zeros."""
        theirs = merge_in_peft(TWO, directories, "foosvd")
        assert all(not a.any() and not b.any() for a, b in theirs.factors.values())
        self.assert_refused(directories, tmp_path / "out", "foosvd", "method")

    def test_unknown_majority_sign(self, directories: list[Path], tmp_path: Path) -> None:
        """PEFT finds out in the middle, and a second try with that name does nothing."""
        model = peft.load_adapters(TWO, directories)
        options = {"density": 0.5, "majority_sign_method": "most"}
        with pytest.raises(RuntimeError, match="Unimplemented mask method"):
            peft.merge(model, PAIR, "ties", **options)
        again = peft.merge(model, PAIR, "ties", density=0.5)
        assert all(not b.any() for _, b in again.factors.values())
        self.assert_refused(
            directories,
            tmp_path / "out",
            "ties",
            "majority_sign",
            density=0.5,
            majority_sign="most",
        )

    def test_taken_name(self, directories: list[Path], tmp_path: Path) -> None:
        """PEFT returns without a word and leaves what was there."""
        model = peft.load_adapters(TWO, directories)
        before = peft.merge(model, PAIR, "cat")
        after = peft.merge(model, (5.0, 5.0), "cat")
        for target, (a, _) in after.factors.items():
            np.testing.assert_array_equal(a, before.factors[target][0])
        merge_files(directories, tmp_path / "out", "cat")
        with pytest.raises(errors.OutputExistsError):
            merge_files(directories, tmp_path / "out", "cat", (5.0, 5.0))

    def test_clamp_of_a_negative_quantile(self, directories: list[Path], tmp_path: Path) -> None:
        """PEFT's lower limit is then above its upper one, and every entry becomes one value."""
        theirs = merge_in_peft(TWO, directories, "svd", svd_clamp=0.3)
        for a, b in theirs.factors.values():
            assert np.ptp(a) == np.ptp(b) == 0
        with pytest.raises(errors.ClampError):
            merge_files(directories, tmp_path / "out", "svd", clamp=0.3)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("clamp", [0.0, 1.3, -0.5])
    def test_clamp_out_of_range(
        self, clamp: float, directories: list[Path], tmp_path: Path
    ) -> None:
        self.assert_refused(directories, tmp_path / "out", "svd", "clamp", clamp=clamp)

    def test_clamp_of_a_large_module(self, tmp_path: Path) -> None:
        """PEFT's torch.quantile takes 2**24 entries; here the two factors have more."""
        with pytest.raises(RuntimeError, match="input tensor is too large"):
            torch.quantile(torch.zeros(2**24 + 1), 0.99)
        rank, block = 16, 2**16 + 1
        sigma = np.arange(rank, 0, -1.0)
        rows = np.random.default_rng(0).standard_normal((rank, block)).astype(np.float32)
        rows = rows.astype(np.float64)
        a = np.zeros((rank, rank, block))
        a[range(rank), range(rank)] = rows
        norms = np.linalg.norm(rows, axis=1)
        source = Source(a.reshape(rank, -1), np.diag(sigma), 1.0)
        assert rank * (rank + source.a.shape[1]) > 2**24
        directory = write_adapter(tmp_path / "in", {"layer": source})
        ours = merge_files([directory], tmp_path / "out", "svd", [1.0], clamp=0.99)["layer"]
        order = np.argsort(-sigma * norms)
        signs = np.sign((ours.a * source.a[order]).sum(axis=1))
        v = source.a[order] / norms[order, None] * signs[:, None]
        u_s = np.eye(rank)[:, order] * (sigma * norms)[order] * signs
        high = np.quantile(np.concatenate([u_s.ravel(), v.ravel()]), 0.99)
        assert np.abs(ours.a - np.clip(v, -high, high)).max() < CLOSE * high
        assert np.abs(ours.b - np.clip(u_s, -high, high)).max() < CLOSE * high


class TestLayerKinds:
    """Kinds of layer on which PEFT's `*_svd` types fail."""

    @pytest.mark.parametrize("method", restated.DELTA_METHODS)
    @pytest.mark.parametrize("kind", KINDS_WITHOUT_SVD)
    def test_peft_raises(self, kind: str, method: str, tmp_path: Path) -> None:
        """What streammerge makes of the same files: `test_against_peft.py`."""
        layers = peft.one_layer(kind)
        directories = save_pair(tmp_path, layers, {}, {})
        with pytest.raises(RuntimeError):
            merge_in_peft(layers, directories, method, density=0.5)

    @pytest.mark.parametrize(("channels_in", "channels_out"), [(12, 1), (1, 12)])
    def test_pointwise_convolution_of_one_channel(
        self, channels_in: int, channels_out: int, tmp_path: Path
    ) -> None:
        def layers() -> dict[str, nn.Module]:
            return {"layer": nn.Conv2d(channels_in, channels_out, 1)}

        directories = save_pair(tmp_path, layers, {"r": 1}, {"r": 1})
        with pytest.raises(RuntimeError, match="must have at least 2 dimensions"):
            merge_in_peft(layers, directories, "svd")
        ours = merge_files(directories, tmp_path / "out", "svd")
        assert_deltas(ours, expected_deltas(directories, "svd"))

    @pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
    def test_grouped_convolution(self, tmp_path: Path) -> None:
        """In a group only r/groups columns of B meet A; PEFT's cat mixes the groups up."""

        def layers() -> dict[str, nn.Module]:
            return {"layer": nn.Conv2d(8, 12, 3, groups=2, bias=False)}

        directories = save_pair(tmp_path, layers, {"r": 4}, {"r": 4})
        model = peft.load_adapters(layers, directories)
        model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], peft.MERGED, combination_type="cat")
        layer = peft.lora_layers(model)["layer"]
        x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
        change = {}
        for adapter in ("a0", "a1", peft.MERGED):
            model.set_adapter(adapter)
            with torch.no_grad():
                change[adapter] = layer(x) - layer.get_base_layer()(x)
        true = change["a0"] + change["a1"]
        assert (change[peft.MERGED] - true).norm() / true.norm() > 0.5
        for method in ("cat", "svd"):
            with pytest.raises(errors.UnsupportedAdapterError, match="group"):
                merge_files(directories, tmp_path / method, method)


class TestVariants:
    """What PEFT drops without a word, and streammerge refuses by name."""

    def test_trained_head(self, tmp_path: Path) -> None:
        """The merged head is the base model's, not the trained one."""
        layers = peft.linear_layers(first=(10, 14), head=(5, 9))
        only = {"target_modules": ["first"]}
        directories = save_pair(tmp_path, layers, {**only, "modules_to_save": ["head"]}, only)
        file = directories[0] / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors["base_model.model.head.weight"].fill_(7.0)
        save_file(tensors, file, metadata={"format": "pt"})
        model = merge_in_peft(layers, directories, "cat").model
        heads = model.base_model.model.head.modules_to_save
        assert (heads["a0"].weight == 7).all()
        assert (heads[peft.MERGED].weight != 7).all()
        with pytest.raises(errors.ExtraTensorsError, match="head") as refused:
            merge_files(directories, tmp_path / "out", "cat")
        assert set(refused.value.names) == {
            "base_model.model.head.bias",
            "base_model.model.head.weight",
        }
        ours = merge_files(directories, tmp_path / "dropped", "cat", extras="drop")
        assert ours.keys() == {"first"}

    @pytest.mark.parametrize("which", [0, 1])
    def test_dora(self, which: int, tmp_path: Path) -> None:
        """The trained magnitudes are ignored: fresh ones if the first has them, else none."""
        configs = [{"use_dora": position == which} for position in range(2)]
        directories = save_pair(tmp_path, TWO, *configs)
        model = merge_in_peft(TWO, directories, "cat").model
        assert model.peft_config[peft.MERGED].use_dora is (which == 0)
        with pytest.raises(errors.UnsupportedAdapterError) as refused:
            merge_files(directories, tmp_path / "out", "cat")
        assert refused.value.variant == "DoRA"
        assert str(directories[which]) in str(refused.value)

    @pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")
    @pytest.mark.parametrize("which", [0, 1])
    def test_lora_bias(self, which: int, tmp_path: Path) -> None:
        """Trained biases are not merged: zeros if the first has them, else none."""
        configs = [{"lora_bias": position == which} for position in range(2)]
        directories = save_pair(tmp_path, TWO, *configs)
        model = peft.load_adapters(TWO, directories)
        for layer in peft.lora_layers(model).values():
            layer.lora_B[f"a{which}"].bias.data.fill_(7.0)
        peft.merge(model, PAIR, "cat")
        for layer in peft.lora_layers(model).values():
            bias = layer.lora_B[peft.MERGED].bias
            assert bias is None or not bias.any()
        with pytest.raises(errors.ExtraTensorsError, match="bias"):
            merge_files(directories, tmp_path / "out", "cat")

    @pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
    def test_pissa(self, tmp_path: Path) -> None:
        """PEFT's merge changes the BASE weights; the files are deltas against another base."""
        directories = save_pair(tmp_path, TWO, {"init_lora_weights": "pissa"}, {})
        model = peft.load_adapters(TWO, directories)
        layers = peft.lora_layers(model).values()
        before = [layer.get_base_layer().weight.clone() for layer in layers]
        peft.merge(model, PAIR, "cat")
        for layer, weight in zip(layers, before, strict=True):
            assert (layer.get_base_layer().weight - weight).abs().max() > 0.01
        with pytest.raises(errors.UnsupportedAdapterError, match=r"(?i)pissa"):
            merge_files(directories, tmp_path / "out", "cat")

    def test_target_parameters(self, tmp_path: Path) -> None:
        """Refused by both."""

        class Experts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(2, 6, 5))

        def layers() -> dict[str, nn.Module]:
            return {"experts": Experts()}

        config = {"target_modules": [], "target_parameters": ["experts.weight"]}
        directories = save_pair(tmp_path, layers, config, config)
        with pytest.raises(ValueError, match="does not support targeting"):
            merge_in_peft(layers, directories, "cat")
        with pytest.raises(errors.UnsupportedAdapterError, match="target_parameters"):
            merge_files(directories, tmp_path / "out", "cat")


class TestDtypes:
    """Where PEFT's result depends on the base model's dtype, or on how it was loaded."""

    def test_cat_over_a_half_precision_base(self, tmp_path: Path) -> None:
        """PEFT copies float32 factors into an adapter of the base model's dtype."""

        def half() -> dict[str, nn.Module]:
            return {name: layer.half() for name, layer in TWO().items()}

        weights = (1.0, 0.3)
        directories = save_pair(tmp_path, TWO, {}, {})
        expected = expected_deltas(directories, "cat", weights)
        theirs = merge_in_peft(half, directories, "cat", weights)
        for target, delta in expected.items():
            assert peft.relative_error(theirs.delta(target), delta) > 1e-4
        assert_deltas(merge_files(directories, tmp_path / "out", "cat", weights), expected)

    def test_whole_number_weights_on_half_precision_adapters(self, tmp_path: Path) -> None:
        """Then nothing in PEFT turns float16 into float32 before the SVD."""

        def half() -> dict[str, nn.Module]:
            return {name: layer.half() for name, layer in TWO().items()}

        directories = [
            peft.save_adapter(
                tmp_path / f"source{i}", TWO, seed=i, dtype=torch.float16, r=3, lora_alpha=6
            )
            for i in range(2)
        ]
        model = PeftModel.from_pretrained(
            peft.Net(half()), str(directories[0]), adapter_name="a0", autocast_adapter_dtype=False
        )
        model.load_adapter(str(directories[1]), adapter_name="a1", autocast_adapter_dtype=False)
        with pytest.raises(NotImplementedError, match="not implemented for 'Half'"):
            peft.merge(model, [1, 2], "svd")
        ours = merge_files(directories, tmp_path / "out", "svd", [1, 2], dtype="float32")
        assert_deltas(ours, expected_deltas(directories, "svd", [1, 2]), rank=RANK)

    @pytest.mark.parametrize("method", ["cat", "linear", "magnitude_prune", "dare_linear"])
    def test_overflow_of_float32(self, method: str, tmp_path: Path) -> None:
        """PEFT returns infinities; an output that cannot hold its values is refused."""
        source = Source(np.full((2, 12), 1e20), np.full((8, 2), 1e20), 1.0)
        directory = write_adapter(tmp_path / "in", {"layer": source})
        options = {"density": 0.9} if restated.uses_density(method) else {}
        weight = 1e20 if method == "cat" else 1e38
        layers = peft.linear_layers(layer=(8, 12))
        theirs = merge_in_peft(layers, [directory] * 2, "cat", [weight, 0.0])
        assert np.isinf(theirs.factors["layer"][0]).any()
        with pytest.raises(errors.ComputeOverflowError, match="layer"):
            merge_files([directory], tmp_path / "out", method, [weight], **options)
        assert not (tmp_path / "out").exists()

    def test_overflow_of_float16(self, tmp_path: Path) -> None:
        """What float16 sources add up to may not fit float16; PEFT goes over to float32."""
        source = Source(np.full((2, 12), 3e4), np.full((8, 2), 1.0), 1.0)
        directory = write_adapter(tmp_path / "in", {"layer": source}, dtype=torch.float16)
        pair = [directory, directory]
        with pytest.raises(errors.OutputOverflowError) as refused:
            merge_files(pair, tmp_path / "out", "cat", [3.0, 1.0])
        assert refused.value.value == pytest.approx(9e4)
        assert refused.value.dtype == "float16"
        assert not (tmp_path / "out").exists()
        ours = merge_files(pair, tmp_path / "wide", "cat", [3.0, 1.0], dtype="bfloat16")
        assert peft.relative_distance(ours["layer"].delta, 4 * source.delta) < 1e-2

    @pytest.mark.parametrize("method", ["magnitude_prune_svd", "ties_svd", "dare_ties_svd"])
    @pytest.mark.parametrize("shape", [(8, 12), (700, 520)], ids=["small", "large"])
    def test_overflow_of_a_delta(self, shape: tuple[int, int], method: str, tmp_path: Path) -> None:
        """PEFT's SVD fails on infinities without naming a module."""
        directory = self._save_huge(tmp_path / "in", shape)
        with pytest.raises(torch.linalg.LinAlgError):
            merge_in_peft(
                peft.linear_layers(layer=shape), [directory] * 2, method, (1.0, 1.0), density=0.9
            )
        with pytest.raises(errors.MergeFailedError, match="layer"):
            merge_files([directory] * 2, tmp_path / "out", method, (1.0, 1.0), density=0.9)
        assert not (tmp_path / "out").exists()

    def test_svd_of_a_delta_that_would_overflow(self, tmp_path: Path) -> None:
        """The sum is never formed here, and its factors fit."""
        directory = self._save_huge(tmp_path / "in", (8, 12))
        with pytest.raises(torch.linalg.LinAlgError):
            merge_in_peft(peft.linear_layers(layer=(8, 12)), [directory] * 2, "svd", (1.0, 1.0))
        ours = merge_files([directory] * 2, tmp_path / "out", "svd", (1.0, 1.0))
        assert_deltas(ours, expected_deltas([directory] * 2, "svd", (1.0, 1.0)), rank=2)

    @staticmethod
    def _save_huge(directory: Path, shape: tuple[int, int]) -> Path:
        m, n = shape
        source = random_source(0, m, n, 2)
        huge = Source(source.a * 2.0**66, source.b * 2.0**66, 1.0)
        return write_adapter(directory, {"layer": huge})


def test_a_zero_weight_still_votes(tmp_path: Path) -> None:
    """Not a fault but easy to miss: elections do not see the weights, in either."""
    setting = Setting((AdapterSpec(6), AdapterSpec(6)), (1.0, 0.0), density=1.0)
    directories = cases.save(tmp_path, TWO, setting)
    with pytest.warns(UserWarning, match="no pruning"):
        theirs = merge_in_peft(TWO, directories, "ties_svd", setting.weights, density=1.0)
    ours = merge_files(
        directories, tmp_path / "out", "ties_svd", setting.weights, density=1.0, rank=9
    )
    alone = expected_deltas(directories, "svd", setting.weights)["second"]
    assert peft.relative_error(theirs.untruncated["second"], alone) > 0.1
    assert peft.relative_error(ours["second"].delta, theirs.untruncated["second"]) < CLOSE
