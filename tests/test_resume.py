"""A merge that was ended at any moment goes on from what is done, to the same bytes."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import streammerge
from making import CONFIG, PREFIX, WEIGHTS, linear, make_factors, put, write_adapter
from names import PAIRS, chosen, most, rule_of
from streammerge import errors, events
from streammerge.budget import parse_duration
from streammerge.output.staging import MARK_NAME, journal_path, staging_path
from streammerge.output.writer import RegionWriter
from streammerge.plans import Sources
from streammerge.resume import identity

TARGETS = {f"{i}.up": linear(40 + i, 60, 4) for i in range(6)}
SAME = (WEIGHTS, CONFIG, MARK_NAME)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    return [write_adapter(folder / f"{i}", TARGETS, seed=i) for i in range(3)]


def options_for(method: str) -> dict[str, Any]:
    density = {"density": 0.4} if rule_of(method).needs_density else {}
    return {**chosen(method), "seed": 5, **density}


def end_after(count: int, how: BaseException | type[BaseException] = KeyboardInterrupt) -> Any:
    """A listener that ends the run after so many targets."""
    seen = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.TaskDone):
            seen.append(event.target)
            if len(seen) == count:
                raise how

    return listen


def stop(sources: Sequence[Path], out: Path, count: int = 3, **options: Any) -> None:
    """Begin a merge and end it after so many targets."""
    options = {"workers": 1} | options
    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(sources, out, on_event=end_after(count), **options)
    assert staging_path(out).is_dir()
    assert not out.exists()


def go_on(sources: Sequence[Path], out: Path, **options: Any) -> tuple[int, list[str]]:
    """Go on with a merge; return how many targets were taken over, and those that were merged."""
    heard: list[events.Event] = []
    streammerge.merge(sources, out, resume=True, on_event=heard.append, **options)
    taken = [event.done for event in heard if isinstance(event, events.Resumed)]
    done = [event.target for event in heard if isinstance(event, events.TaskDone)]
    assert sorted(p.name for p in out.parent.iterdir() if p.name.startswith(".out")) == []
    return sum(taken), done


def written(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in SAME}


@pytest.fixture
def undisturbed(sources: list[Path], tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    def make(**options: Any) -> dict[str, bytes]:
        streammerge.merge(sources, tmp_path / "undisturbed", **options)
        return written(tmp_path / "undisturbed")

    return make


@pytest.mark.parametrize("method", PAIRS)
def test_goes_on_to_the_same_bytes(method: str, sources: list[Path], tmp_path: Path) -> None:
    """Ended on one thread, gone on with on two, reading in another way, in another memory."""
    options, sources = options_for(method), sources[: most(method)]
    streammerge.merge(sources, tmp_path / "undisturbed", **options)
    stop(sources, tmp_path / "out", workers=1, **options)
    taken, done = go_on(
        sources, tmp_path / "out", workers=2, io="pread", max_memory="3GiB", **options
    )
    assert taken == 3
    assert sorted(done) == sorted(TARGETS)[3:]
    assert written(tmp_path / "out") == written(tmp_path / "undisturbed")


def test_ended_again_and_again(sources: list[Path], undisturbed: Any, tmp_path: Path) -> None:
    stop(sources, tmp_path / "out", 1, workers=2)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            streammerge.merge(
                sources, tmp_path / "out", resume=True, workers=1, on_event=end_after(1)
            )
    taken, done = go_on(sources, tmp_path / "out")
    assert taken >= 4
    assert taken + len(done) == len(TARGETS)
    assert written(tmp_path / "out") == undisturbed()


def test_ended_when_all_is_done(
    sources: list[Path], undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Config and record are written already, and are written again."""

    def ended(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("streammerge.api.write_timings", ended)
        with pytest.raises(KeyboardInterrupt):
            streammerge.merge(sources, tmp_path / "out")
    assert (staging_path(tmp_path / "out") / MARK_NAME).exists()
    assert go_on(sources, tmp_path / "out") == (len(TARGETS), [])
    assert written(tmp_path / "out") == undisturbed()


def test_nothing_to_go_on_with(sources: list[Path], undisturbed: Any, tmp_path: Path) -> None:
    """The same command begins a merge and goes on with it."""
    taken, done = go_on(sources, tmp_path / "out")
    assert (taken, len(done)) == (0, len(TARGETS))
    assert written(tmp_path / "out") == undisturbed()


def test_an_earlier_output_stays_until_the_end(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    streammerge.merge(sources, out, method="cat")
    before = written(out)
    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(sources, out, overwrite=True, workers=1, on_event=end_after(2))
    assert written(out) == before
    with pytest.raises(errors.OutputExistsError):
        streammerge.merge(sources, out, resume=True)
    assert go_on(sources, out, overwrite=True)[0] == 2
    assert written(out) != before


@pytest.mark.parametrize("between", [True, False])
def test_killed_where_names_cannot_be_exchanged(
    between: bool, sources: list[Path], tmp_path: Path
) -> None:
    """The earlier output lies aside: between the two renames, or behind both."""
    out, aside = tmp_path / "out", tmp_path / ".out.streammerge-old"
    streammerge.merge(sources, out, method="cat")
    before = written(out)
    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(sources, out, overwrite=True, on_event=end_after(2), workers=1)
    if between:
        out.rename(aside)
    else:
        aside.mkdir()
        (aside / WEIGHTS).write_text("old")
    seen = []

    def look(_: events.Event) -> None:
        seen.append(written(out) == before and not aside.exists())

    streammerge.merge(sources, out, overwrite=True, resume=True, on_event=look)
    assert seen[0]
    assert not list(tmp_path.glob(".out*"))
    assert written(out) != before


@pytest.mark.parametrize("resume", [True, False])
def test_an_input_that_lies_aside(resume: bool, sources: list[Path], tmp_path: Path) -> None:
    """The output is one of the inputs, and was killed between the two renames."""
    out, aside = tmp_path / "out", tmp_path / ".out.streammerge-old"
    paths = [out, sources[1]]
    streammerge.merge(sources, out, method="cat")
    streammerge.merge(paths, tmp_path / "undisturbed", method="cat")
    with pytest.raises(KeyboardInterrupt):
        streammerge.merge(
            paths, out, method="cat", overwrite=True, on_event=end_after(2), workers=1
        )
    out.rename(aside)
    streammerge.merge(paths, out, method="cat", overwrite=True, resume=resume)
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "undisturbed" / WEIGHTS).read_bytes()
    assert not list(tmp_path.glob(".out*"))


# ---------------------------------------------------------------------------------------------
# What is on the disk is not trusted


def spoil(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_what_does_not_read_back_is_made_again(
    sources: list[Path], undisturbed: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stop(sources, out, 3, workers=1, method="cat")
    header = 8 + int.from_bytes((staging_path(out) / WEIGHTS).read_bytes()[:8], "little")
    spoil(staging_path(out) / WEIGHTS, header)
    taken, done = go_on(sources, out, method="cat")
    assert taken == 2
    assert len(done) == 4
    assert written(out) == undisturbed(method="cat")


def cut_the_last_line(journal: Path) -> None:
    journal.write_bytes(journal.read_bytes()[:-7])


def flip_the_last_line(journal: Path) -> None:
    spoil(journal, -9)


@pytest.mark.parametrize("harm", [cut_the_last_line, flip_the_last_line])
def test_a_line_that_is_not_whole_does_not_count(
    harm: Callable[[Path], None], sources: list[Path], undisturbed: Any, tmp_path: Path
) -> None:
    stop(sources, tmp_path / "out", 3, workers=1)
    harm(journal_path(tmp_path / "out"))
    assert go_on(sources, tmp_path / "out")[0] == 2
    assert written(tmp_path / "out") == undisturbed()


@pytest.mark.parametrize("harm", ["header", "size", "gone"])
def test_where_nothing_can_be_taken_over_it_begins_anew(
    harm: str, sources: list[Path], undisturbed: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stop(sources, out)
    weights = staging_path(out) / WEIGHTS
    if harm == "header":
        spoil(weights, 20)
    elif harm == "size":
        os.truncate(weights, weights.stat().st_size - 1)
    else:
        weights.unlink()
    taken, done = go_on(sources, out)
    assert (taken, len(done)) == (0, len(TARGETS))
    assert written(out) == undisturbed()


# ---------------------------------------------------------------------------------------------
# What must be the same


def kept(out: Path) -> dict[str, bytes]:
    files = [*staging_path(out).iterdir(), journal_path(out)]
    return {path.name: path.read_bytes() for path in files}


def test_another_recipe_is_refused(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop(sources, out, method="ties_svd", density=0.2)
    before = kept(out)
    with pytest.raises(errors.ResumeError) as caught:
        streammerge.merge(
            sources, out, method="ties_svd", density=0.3, weights=[1, 2, 1], resume=True
        )
    assert caught.value.exit_code == 2
    assert set(caught.value.changes) == {
        "density was 0.2, and is 0.3",
        "weights was [1.0, 1.0, 1.0], and is [1.0, 2.0, 1.0]",
    }
    assert str(out) in str(caught.value)
    assert kept(out) == before
    assert go_on(sources, out, method="ties_svd", density=0.2)[0] == 3


def test_a_changed_input_is_refused(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    inputs = [write_adapter(tmp_path / "mine", TARGETS, seed=9), *sources[1:]]
    stop(inputs, out)
    write_adapter(tmp_path / "mine", TARGETS, seed=10)
    with pytest.raises(errors.ResumeError) as caught:
        streammerge.merge(inputs, out, resume=True)
    assert f"{tmp_path / 'mine' / WEIGHTS} is not the file that it was" in caught.value.changes


def test_an_edited_config_is_refused(sources: list[Path], tmp_path: Path) -> None:
    """It was read when the merge began; what it says of the scaling is another now."""
    out = tmp_path / "out"
    inputs = [write_adapter(tmp_path / "mine", TARGETS, seed=9, alpha=4), *sources[1:]]
    stop(inputs, out)
    before = kept(out)
    config = tmp_path / "mine" / CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 6}))
    with pytest.raises(errors.ResumeError, match="what the adapters' configs say"):
        streammerge.merge(inputs, out, resume=True)
    assert kept(out) == before


def test_another_schedule_is_refused(sources: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop(sources, out, weights=[[{"filter": "0", "value": 2}, {"value": 1}], 1, 1])
    before = kept(out)
    with pytest.raises(errors.ResumeError) as caught:
        streammerge.merge(
            sources, out, weights=[[{"filter": "1", "value": 2}, {"value": 1}], 1, 1], resume=True
        )
    assert any(change.startswith("weights was ") for change in caught.value.changes)
    assert kept(out) == before


@pytest.mark.parametrize("column", [field.name for field in fields(Sources)])
def test_what_each_target_is_made_of_is_part_of_the_identity(
    column: str, sources: list[Path]
) -> None:
    """A journal of other weights, densities or scalings is of another run, whatever led there."""
    plan = streammerge.plan(sources)
    changed = getattr(plan.sources, column).copy()
    changed[-1] += 1
    other = replace(plan, sources=replace(plan.sources, **{column: changed}))
    assert identity(other, (), {})["courses"] != identity(plan, (), {})["courses"]


@pytest.mark.parametrize("what", ["streammerge", "fingerprint", "courses"])
def test_another_version_or_machine_is_refused(
    what: str, sources: list[Path], undisturbed: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stop(sources, out)
    journal = journal_path(out)
    first, *others = journal.read_bytes().splitlines(keepends=True)
    identity = json.loads(first[33:])
    identity[what] = {"torch": "1.0"} if what == "fingerprint" else "other"
    from streammerge.output.journal import _line

    journal.write_bytes(_line(identity) + b"".join(others))
    with pytest.raises(errors.ResumeError) as caught:
        streammerge.merge(sources, out, resume=True)
    assert len(caught.value.changes) == 1
    if what != "fingerprint":
        return
    go_on(sources, out, mixed_hardware=True)
    record, other = (
        json.loads(text) for text in (written(out)[MARK_NAME], undisturbed()[MARK_NAME])
    )
    assert record["fingerprint"] == {"mixed": [{"torch": "1.0"}, other["fingerprint"]]}


def test_an_unfinished_merge_is_not_dropped_in_silence(
    sources: list[Path], undisturbed: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stop(sources, out)
    before = kept(out)
    with pytest.raises(errors.UnfinishedError) as caught:
        streammerge.merge(sources, out)
    assert (caught.value.exit_code, caught.value.done) == (2, 3)
    assert kept(out) == before
    heard: list[events.Event] = []
    streammerge.merge(sources, out, overwrite=True, on_event=heard.append)
    assert len([event for event in heard if isinstance(event, events.TaskDone)]) == len(TARGETS)
    assert written(out) == undisturbed()


def test_an_interrupt_at_the_very_beginning_drops_nothing(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is settled what is to become of what lies there."""
    out = tmp_path / "out"
    stop(sources, out)
    before = kept(out)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("streammerge.output.staging.check_output", interrupted)
        with pytest.raises(KeyboardInterrupt):
            streammerge.merge(sources, out, resume=True)
    assert kept(out) == before
    assert go_on(sources, out)[0] == 3


# ---------------------------------------------------------------------------------------------
# Failures


def test_a_full_disk_is_a_clean_stop(
    sources: list[Path], undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    append = RegionWriter.append

    def full(writer: RegionWriter, data: memoryview) -> None:
        if "4.up" in writer.name:
            code = errno.ENOSPC
            raise errors.StorageError(f"cannot be written ({os.strerror(code)})", path="the file")
        append(writer, data)

    with monkeypatch.context() as patched:
        patched.setattr(RegionWriter, "append", full)
        with pytest.raises(errors.StorageError) as caught:
            streammerge.merge(sources, out, workers=1)
    assert caught.value.exit_code == 1
    assert caught.value.__notes__ == ["4 targets are done and kept; --resume goes on"]
    assert go_on(sources, out)[0] == 4
    assert written(out) == undisturbed()


def test_what_only_other_inputs_can_mend_is_not_kept(sources: list[Path], tmp_path: Path) -> None:
    name = f"{PREFIX}5.up.lora_A.weight"
    spoilt = {name: put(make_factors(TARGETS)[name], 3, math.nan)}
    bad = write_adapter(tmp_path / "bad", TARGETS, extra=spoilt)
    with pytest.raises(errors.NonFiniteError):
        streammerge.merge([sources[0], bad], tmp_path / "out", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


# ---------------------------------------------------------------------------------------------
# The time limit


@pytest.mark.parametrize("workers", [1, 2])
def test_the_time_limit(workers: int, tmp_path: Path) -> None:
    targets = {f"{i}.up": linear(1500, 1500, 8) for i in range(160)}
    sources = [write_adapter(tmp_path / f"{i}", targets, seed=i) for i in range(3)]
    options: dict[str, Any] = {"method": "ties_svd", "density": 0.2, "workers": workers}
    with pytest.raises(errors.StoppedError) as caught:
        streammerge.merge(sources, tmp_path / "out", time_limit=3, **options)
    assert caught.value.exit_code == 75
    assert 0 < caught.value.done < caught.value.targets == 160
    with pytest.raises(errors.StoppedError) as again:
        streammerge.merge(sources, tmp_path / "out", time_limit="2s", resume=True, **options)
    assert again.value.done > caught.value.done


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("90", 90),
        ("50m", 3000),
        ("50min", 3000),
        ("1h30m", 5400),
        ("1:30:00", 5400),
        ("05:30", 330),
        ("2d", 172800),
        ("1.5s", 1.5),
        (5400, 5400),
        (0.25, 0.25),
    ],
)
def test_durations(text: str | float, seconds: float) -> None:
    assert parse_duration(text, option="time_limit") == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "-5", "0", 0, -1, math.inf, math.nan, "1h30", "5 m", True]
)
def test_no_durations(text: str | float) -> None:
    with pytest.raises(errors.RecipeError, match="is not a duration"):
        parse_duration(text, option="time_limit")
