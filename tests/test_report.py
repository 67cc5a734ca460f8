"""`streammerge report`: its figures against dense deltas, and the page itself."""

from __future__ import annotations

import builtins
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import streammerge
from making import PREFIX, WEIGHTS, contents, convolution, embedding, linear, write_adapter
from streammerge import errors
from streammerge.cli import main
from streammerge.events import ignore
from streammerge.reporting import material
from streammerge.reporting.grid import MAX_COLUMNS, MAX_KINDS, make_grid
from streammerge.reporting.order import clustered
from streammerge.reporting.page import SHORTFALLS
from streammerge.reporting.tables import counted
from streammerge.worker import agreement

LAYERS = {
    "model.layers.0.q": linear(24, 16, 3),
    "model.layers.1.q": linear(24, 16, 3),
    "model.layers.1.v": linear(7, 16, 5),
    "words": embedding(10, 30, 3),
    "conv": convolution(8, 4, (3, 3), 3),
}
WEIGHTS_OF = (1.0, 0.5, -2.0)
NAMES = list(LAYERS)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters and their merge in `out`; the third lacks a target."""
    folder = tmp_path_factory.mktemp("merged")
    for seed in range(3):
        layers = {name: LAYERS[name] for name in NAMES[: 4 if seed == 2 else 5]}
        write_adapter(folder / f"in{seed}", layers, seed=seed)
    inputs = [folder / f"in{seed}" for seed in range(3)]
    options: dict[str, Any] = {"method": "svd", "rank": 2, "weights": WEIGHTS_OF}
    streammerge.merge(inputs, folder / "out", on_event=ignore, **options)
    return folder


@pytest.fixture(scope="module")
def reported(merged: Path) -> streammerge.Report:
    return streammerge.report(merged / "out", merged / "page.html", all_targets=True)


def deltas(path: Path) -> dict[str, np.ndarray]:
    """Every delta of an adapter in float64, without the scaling."""
    tensors = load_file(path / WEIGHTS)
    found = {}
    for target in NAMES:
        names = sorted(name for name in tensors if name.startswith(f"{PREFIX}{target}."))
        if names:
            a, b = (tensors[name].astype(np.float64) for name in names)
            a = a.reshape(len(a), -1)
            found[target] = b.reshape(len(b), -1) @ a
    return found


def scaled(merged: Path) -> list[dict[str, np.ndarray]]:
    """The same of the three and their merge, with the scaling: alpha is 6 for all."""
    inputs = [
        {t: d * 6.0 / LAYERS[t].rank for t, d in deltas(merged / f"in{seed}").items()}
        for seed in range(3)
    ]
    return [*inputs, deltas(merged / "out")]


def flat(member: dict[str, np.ndarray]) -> np.ndarray:
    shapes = {t: (layer.b[0], int(np.prod(layer.a[1:]))) for t, layer in LAYERS.items()}
    return np.concatenate([member.get(t, np.zeros(shapes[t])).ravel() for t in NAMES])


# ---------------------------------------------------------------------------------------------
# Figures


def test_cosines_and_norms(merged: Path, reported: streammerge.Report) -> None:
    whole = [flat(member) for member in scaled(merged)]
    norms = [np.linalg.norm(vector) for vector in whole]
    expected = [
        [x @ y / (p * q) for y, q in zip(whole, norms, strict=True)]
        for x, p in zip(whole, norms, strict=True)
    ]
    assert reported.agreement is not None
    np.testing.assert_allclose(reported.agreement.cosine, expected, atol=1e-6)
    found = np.array([target.norms for target in reported.agreement.targets])
    np.testing.assert_allclose(np.sqrt(np.nansum(found**2, axis=0)), norms, rtol=1e-6)


def test_sign_conflict(merged: Path, reported: streammerge.Report) -> None:
    """Deltas are small here, so the sample is all of them."""
    signs = [np.sign(flat(member)) for member in scaled(merged)]
    assert reported.agreement is not None
    for i, x in enumerate(signs):
        for j, y in enumerate(signs):
            expected = ((x * y) < 0).sum() / ((x * y) != 0).sum()
            assert reported.agreement.conflict[i, j] == pytest.approx(expected, abs=2e-3)


def test_mass_in_the_minority(merged: Path, reported: streammerge.Report) -> None:
    members = scaled(merged)[:3]
    assert reported.agreement is not None
    for found in reported.agreement.targets:
        terms = [
            weight * member[found.target]
            for weight, member in zip(WEIGHTS_OF, members, strict=True)
            if found.target in member
        ]
        above = sum(np.maximum(term, 0) for term in terms)
        below = sum(np.maximum(-term, 0) for term in terms)
        expected = np.minimum(above, below).sum() / (above + below).sum()
        assert found.minority == pytest.approx(expected, rel=1e-4)


def test_overlap_of_spaces(merged: Path, reported: streammerge.Report) -> None:
    """By the principal angles between orthonormal bases, target by target."""
    members = scaled(merged)
    assert reported.agreement is not None
    for side, found in (("columns", reported.agreement.columns), ("rows", reported.agreement.rows)):
        for i in range(4):
            for j in range(4):
                both = [t for t in NAMES if t in members[i] and t in members[j]]
                overlaps = [overlap(members[i][t], members[j][t], side) for t in both]
                assert found[i, j] == pytest.approx(np.mean(overlaps), abs=1e-6)


def overlap(x: np.ndarray, y: np.ndarray, side: str) -> float:
    bases = []
    for matrix in (x, y):
        u, s, _ = np.linalg.svd(matrix if side == "columns" else matrix.T)
        bases.append(u[:, : int((s > 1e-5 * s[0]).sum())])
    cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return float((cosines**2).mean())


def test_groups_change_nothing(merged: Path, reported: streammerge.Report) -> None:
    """Where a target's factors do not fit together, pairs of groups meet."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(agreement, "GROUP_COLUMNS", 1)
        other = streammerge.report(merged / "out", merged / "other.html", all_targets=True)
    assert reported.agreement is not None
    assert other.agreement is not None
    for name in ("cosine", "conflict", "columns", "rows"):
        ours, theirs = (getattr(one.agreement, name) for one in (reported, other))
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert other.agreement.checksums == reported.agreement.checksums


def test_an_adapter_agrees_with_itself_and_not_with_its_negative(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", {"x": linear(12, 9, 2)})
    shutil.copytree(one, tmp_path / "same")
    other = tmp_path / "negative"
    shutil.copytree(one, other)
    tensors = load_file(one / WEIGHTS)
    save_file({n: -t if "lora_B" in n else t for n, t in tensors.items()}, other / WEIGHTS)
    inputs = [one, tmp_path / "same", other]
    streammerge.merge(inputs, tmp_path / "out", method="cat", on_event=ignore)
    found = streammerge.report(tmp_path / "out", tmp_path / "page.html").agreement
    assert found is not None
    np.testing.assert_allclose(found.cosine[0, :3], [1, 1, -1], atol=1e-9)
    np.testing.assert_allclose(found.conflict[0, :3], [0, 0, 1])
    np.testing.assert_allclose(found.columns[0, :3], 1.0)


def test_order_puts_families_together() -> None:
    generator = np.random.default_rng(0)
    family = generator.permutation(np.repeat(np.arange(4), 5))
    similarity = np.where(family[:, None] == family, 0.8, 0.0)
    ordered = family[clustered(similarity)]
    assert (np.diff(ordered) != 0).sum() == 3
    assert clustered(similarity) == clustered(similarity.copy())
    assert clustered(np.full((3, 3), np.nan)) == [0, 1, 2]


# ---------------------------------------------------------------------------------------------
# What is missing


def test_inputs_that_are_gone_or_changed(merged: Path, tmp_path: Path) -> None:
    """Left out, each with a reason; what is left is compared."""
    folder = tmp_path / "copy"
    shutil.copytree(merged, folder)
    record = folder / "out" / "streammerge.json"
    record.write_text(record.read_text().replace(str(merged), str(folder)))
    shutil.rmtree(folder / "in0")
    weights = folder / "in1" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")  # as large as before
    made = streammerge.report(folder / "out", tmp_path / "page.html")
    assert made.adapters == ("3 in2",)
    assert "no such" in made.missing[0]
    assert "holds other values" in made.missing[1]
    page = (tmp_path / "page.html").read_text()
    assert "What this page lacks" in page
    assert "Fewer than two adapters" in page
    shutil.rmtree(folder / "in1")
    shutil.rmtree(folder / "in2")
    (folder / "out" / "streammerge-timings.json").unlink()
    bare = streammerge.report(folder / "out", tmp_path / "page.html")
    assert bare.agreement is None
    assert len(bare.missing) == 3
    assert "no streammerge-timings.json" in (tmp_path / "page.html").read_text()


def test_too_much_work_is_done_on_some_targets(merged: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(material, "WORK", 1.0)
    made = streammerge.report(merged / "out", merged / "some.html")
    assert made.agreement is not None
    assert len(made.agreement.targets) == 1
    assert "1 of 5 targets" in (merged / "some.html").read_text()


def test_refusals(merged: Path, tmp_path: Path) -> None:
    before = contents(merged / "out")
    with pytest.raises(errors.MissingFileError):
        streammerge.report(merged / "in0", tmp_path / "page.html")
    with pytest.raises(errors.RecipeError, match="outside of the output"):
        streammerge.report(merged / "out", merged / "out" / "page.html")
    with pytest.raises(errors.StorageError, match="cannot be written"):
        streammerge.report(merged / "out", tmp_path / "gone" / "page.html")
    assert contents(merged / "out") == before
    streammerge.verify(merged / "out")


@pytest.mark.parametrize("field", ["recipe", "modules", "inputs", "other_files"])
def test_a_record_that_is_none(field: str, merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged / "out", tmp_path / "out")
    path = tmp_path / "out" / "streammerge.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {field: [7]}))
    with pytest.raises(errors.CorruptFileError, match="not a record"):
        streammerge.report(tmp_path / "out", tmp_path / "page.html")


@pytest.mark.parametrize("field", SHORTFALLS)
def test_targets_that_fell_short_are_told(field: str, merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged / "out", tmp_path / "out")
    path, page = tmp_path / "out" / "streammerge.json", tmp_path / "page.html"
    record = json.loads(path.read_text())
    assert {facts[field] for facts in record["modules"].values()} == {True}
    streammerge.report(tmp_path / "out", page)
    assert SHORTFALLS[field] not in page.read_text()
    record["modules"]["words"][field] = False
    path.write_text(json.dumps(record))
    streammerge.report(tmp_path / "out", page)
    assert f"Of {len(NAMES)} targets" in page.read_text()
    assert f"1 {SHORTFALLS[field]} (such as words)" in page.read_text()


# ---------------------------------------------------------------------------------------------
# The page


class Page(HTMLParser):
    """What a page opens and closes, and whether it loads anything."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.opened

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            assert name not in {"src", "srcset", "onload", "onerror", "style"}, (tag, name)
            assert name != "href" or (value or "").startswith("#")
        if tag not in self.VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag


HARMLESS = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "nav", "a", "h1", "h2"),
    *("h3", "p", "div", "ul", "li", "b", "span", "strong", "figure", "section", "details"),
    *("summary", "pre", "table", "thead", "tbody", "tr", "th", "td", "svg", "g", "rect", "path"),
    *("text", "title"),
}


def test_the_page_stands_alone(merged: Path, reported: streammerge.Report) -> None:
    text = reported.page.read_text()
    assert Page(text).tags <= HARMLESS
    assert "://" not in text
    assert not re.search(r"url\(|@import", text)
    for part in ("in0", "model.layers.1.v", "svd", "measured peak", "Sign conflict"):
        assert part in text
    assert "What this page lacks" not in text
    assert "Nothing was truncated" not in text
    again = streammerge.report(merged / "out", merged / "again.html", all_targets=True)
    assert again.page.read_text() == text


def test_names_leave_room_for_what_is_said_of_them(reported: streammerge.Report) -> None:
    """They are broken where it is narrow; a number is not."""
    text = reported.page.read_text()
    assert "<td class=name>model.layers.1.v</td><td class=n>" in text
    assert "td.name{white-space:normal" in text
    assert "lost most first" in text
    assert "– is what lies in none" in text


def test_what_was_not_measured_is_in_the_order_of_layers(tmp_path: Path) -> None:
    layers = {f"model.layers.{n}.q": linear(8, 8, 2) for n in (0, 2, 10)}
    inputs = [write_adapter(tmp_path / f"in{n}", layers, seed=n) for n in range(2)]
    streammerge.merge(inputs, tmp_path / "out", method="linear", on_event=ignore)
    text = streammerge.report(tmp_path / "out", tmp_path / "page.html").page.read_text()
    table = text[text.index("<h3>Targets</h3>") :]
    places = [table.index(f"<td class=name>model.layers.{n}.q") for n in (0, 2, 10)]
    assert places == sorted(places)
    assert "lost most first" not in text
    assert "lies in none" not in text


def test_names_sort_as_people_count() -> None:
    names = ["a.10.b", "a.2.b", "a", "a.2", "b.1", f"a.{'9' * 5000}"]
    assert sorted(names, key=counted)[:5] == ["a", "a.2", "a.2.b", "a.10.b", f"a.{'9' * 5000}"]


EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>&\x1b[31m\u202e'


def test_hostile_names(tmp_path: Path) -> None:
    layers = {f"layers.0.{EVIL}": linear(8, 8, 2), f"{EVIL}.5.x": linear(8, 8, 2)}
    inputs = [
        write_adapter(tmp_path / f"{n}'\"<script>&", layers, seed=n, base_model_name_or_path=EVIL)
        for n in range(2)
    ]
    streammerge.merge(inputs, tmp_path / "out", method="svd", on_event=ignore)
    path = tmp_path / "out" / "streammerge.json"
    record = json.loads(path.read_text())
    record["fingerprint"][EVIL] = EVIL
    record["rule"] = record["recipe"]["include"] = EVIL
    record["recipe"]["include"] = None
    path.write_text(json.dumps(record))
    made = streammerge.report(tmp_path / "out", tmp_path / "page.html")
    text = made.page.read_text()
    assert Page(text).tags <= HARMLESS
    assert "&lt;script&gt;" in text
    assert not {c for c in text if c != "\n" and not c.isprintable()}


def test_many_targets_make_a_small_grid() -> None:
    """An MoE of 45,000 targets, and names that are all of another kind."""
    experts = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
        for layer in range(59)
        for expert in range(256)
        for part in ("gate", "up", "down")
    ]
    grid = make_grid(experts)
    assert grid.kinds == tuple(f"mlp.experts.*.{part}_proj" for part in ("down", "gate", "up"))
    assert grid.columns == tuple(map(str, range(59)))
    mean = grid.mean({name: float("experts.7." in name) for name in experts})
    np.testing.assert_allclose(mean, 1 / 256)
    odd = make_grid([f"a.{n}.kind{n}" for n in range(3000)])
    assert len(odd.kinds) == MAX_KINDS
    assert len(odd.columns) <= MAX_COLUMNS


def test_the_page_of_many_stays_small(tmp_path: Path) -> None:
    """300 adapters and 20,001 targets in the record; two of the adapters still lie there."""
    inputs = [
        write_adapter(tmp_path / f"in{n}", {"l.0.x": linear(4, 4, 1)}, seed=n) for n in range(2)
    ]
    streammerge.merge(inputs, tmp_path / "out", method="svd", on_event=ignore)
    path = tmp_path / "out" / "streammerge.json"
    record = json.loads(path.read_text())
    (facts,) = record["modules"].values()
    record["modules"] |= {f"layers.{n % 80}.experts.{n}.x": facts for n in range(20_000)}
    record["inputs"] += [record["inputs"][1] | {"path": f"/gone/{n}"} for n in range(298)]
    record["recipe"]["adapters"] += [f"/gone/{n}" for n in range(298)]
    record["recipe"]["weights"] += [1.0] * 298
    path.write_text(json.dumps(record))
    made = streammerge.report(tmp_path / "out", tmp_path / "page.html")
    assert len(made.missing) == 298
    assert made.page.stat().st_size < 2_000_000


# ---------------------------------------------------------------------------------------------
# The command, and plots


def test_the_command(merged: Path, tmp_path: Path) -> None:
    page = str(tmp_path / "page.html")
    found = CliRunner().invoke(main, ["report", str(merged / "out"), "-o", page])
    assert found.exit_code == 0, found.output
    assert found.output == f"{page}: 3 adapters compared\n"
    found = CliRunner().invoke(main, ["report", str(merged / "out"), "-o", page, "--json"])
    facts = json.loads(found.output)
    assert facts["adapters"] == ["1 in0", "2 in1", "3 in2"]
    assert len(facts["agreement"]["cosine"]) == 4
    found = CliRunner().invoke(main, ["report", str(tmp_path), "-o", page])
    assert found.exit_code == 2


def test_plots(merged: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    made = streammerge.report(merged / "out", tmp_path / "page.html", plots=tmp_path / "plots")
    assert {path.stem for path in made.plots} == {
        *("cosine", "signs", "columns", "rows", "kept", "error", "agreement", "merged", "minority")
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made.plots)


def test_plots_without_matplotlib(merged: Path, tmp_path: Path, monkeypatch: Any) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".", maxsplit=1)[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(errors.RecipeError, match=r"streammerge\[plots\]"):
        streammerge.report(merged / "out", tmp_path / "page.html", plots=tmp_path / "plots")
    assert list(tmp_path.iterdir()) == []
    streammerge.report(merged / "out", tmp_path / "page.html")


def test_real_adapters(real_adapters: Path, tmp_path: Path) -> None:
    inputs = sorted(path for path in (real_adapters / "tinyllama-1.1b").iterdir() if path.is_dir())
    options: dict[str, Any] = {"include": r"layers\.[0-3]\.", "rank": 8}
    streammerge.merge(inputs, tmp_path / "out", method="svd", on_event=ignore, **options)
    made = streammerge.report(tmp_path / "out", tmp_path / "page.html")
    assert made.missing == ()
    assert made.agreement is not None
    assert [n for n, _ in made.agreement.checksums] == [8] * 4
