"""The end of a run: every region read back, files made durable, config and record written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from streammerge.adapter import Adapter, NameTable
from streammerge.errors import MergeFailedError, VerificationError
from streammerge.kernels.census import Cuts
from streammerge.ledger import Ledger
from streammerge.output.record import write_config, write_record
from streammerge.output.writer import RegionReader, sync_file
from streammerge.planner.scaling import scalings
from streammerge.plans import Plan, Task
from streammerge.readers import read_adapter
from streammerge.recipe_file import write_recipe
from streammerge.worker import Receipt

VERSION = metadata.version("streammerge")
"""Looked up when the module is loaded: a package that is not installed fails before the work."""


@dataclass(frozen=True)
class ModuleReport:
    """What became of one target: a weight matrix of m × n that adapters change."""

    target: str
    """The module's path in the model."""
    m: int
    """Outputs of the module: rows of B."""
    n: int
    """Inputs of the module: columns of A."""
    rank: int
    """Of the output."""
    rank_reached: bool
    """False where a rank policy asks for more than the largest rank that it allows keeps."""
    adapters: int
    """How many have this target."""
    route: str
    """How it was computed, as `streammerge.plans.Route` names it."""
    kept_energy: float | None
    """Share of the merged matrix's energy that the truncated pair keeps; None where nothing is
    truncated, or where a rule on factors has no merged matrix."""
    relative_error: float | None
    """‖M - B·A‖/‖M‖ of the pair as written."""
    excess: float | None
    """How far that is above the best possible of the rank, relatively; an estimate."""
    converged: bool
    """False where the planned passes did not reach the tolerance."""
    device: str
    """Where it was computed; out of device memory a target goes to the CPU."""
    directions: tuple[int, ...] | None
    """How many directions the bases have in which the rule saw coordinates: of columns, and in
    core space of rows too; None where the rule saw the tensors themselves."""
    basis_gap: float | None
    """The smallest relative distance of neighbouring singular values of these bases."""
    basis_unique: bool
    """False where that is below 1e-6: which directions stand for equal values is a matter of
    rounding then, and the result may differ on other hardware."""
    settled: bool
    """False where the iteration for these bases (`ctm`), or for the weights of the deltas
    (`karcher`), used up its steps before it came to rest."""
    last_step: float | None
    """How far its last step went then: of bases the norm of the sines of the angles, of weights an
    angle; None where it came to rest, or where nothing was iterated."""


BASIS_GAP = 1e-6
"""From this relative distance on singular vectors are told apart in spite of rounding."""


def finish(
    planned: Plan,
    manifests: Sequence[Adapter],
    directory: Path,
    starts: Sequence[int],
    ledger: Ledger,
    *,
    cuts: Cuts | None,
    fingerprint: dict[str, Any],
    check: Callable[[], None],
) -> tuple[ModuleReport, ...]:
    """Read every region back, make the files durable, write config and record; return reports.

    Args:
        planned: what was done.
        manifests: the adapters that it was done to.
        directory: of the output's files.
        starts: where each of these files' data begin.
        ledger: what the tasks left behind.
        cuts: thresholds over whole adapters, where there are such.
        fingerprint: what decided the rounding of results.
        check: called now and then; raises when the run is to stop.

    Raises:
        VerificationError: a region does not read back as it was written.
        MergeFailedError: the output as a whole does not.
    """
    receipts = ledger.receipts
    modules = tuple(
        _report(task, receipt)
        for task, receipt in zip(planned.tasks, receipts, strict=True)
        if not task.is_extra
    )
    for file in planned.files:
        check()
        sync_file(directory / file.name)
    tensors = _read_back(planned, directory, starts, receipts, check)
    write_config(directory, planned, write_recipe(_pinned(planned.recipe, manifests)))
    facts = {
        "streammerge": VERSION,
        "fingerprint": fingerprint,
        "inputs": [
            {**_input(manifest, read), **({} if cuts is None else _pruned(cuts, i))}
            for i, (manifest, read) in enumerate(zip(manifests, ledger.inputs, strict=True))
        ],
        "modules": {report.target: _facts(report) for report in modules},
        "extras": [asdict(module) for module in planned.extras],
    }
    write_record(directory, planned, facts, tensors)
    written = read_adapter(str(directory), NameTable())
    counts = len(written), len(written.extra_columns)
    targets = len(modules)
    if (
        counts != (targets, len(planned.tasks) - targets)
        or not (scalings(written, None) == 1.0).all()
    ):
        raise MergeFailedError(f"{directory}: what was written does not read back as planned")
    return modules


def _read_back(
    planned: Plan,
    directory: Path,
    starts: Sequence[int],
    receipts: Sequence[Receipt],
    check: Callable[[], None],
) -> dict[str, str]:
    """Compare every region with its receipt; return the checksums by tensor."""
    regions = planned.regions
    checksums = [checksum for receipt in receipts for checksum in receipt.checksums]
    problems = []
    names = [file.name for file in planned.files]
    with RegionReader(directory, names, starts) as reader:
        for region, checksum in zip(regions, checksums, strict=True):
            check()
            if reader.checksum(region) != checksum:
                name = names[region.file]
                problems.append(f"{name}: {region.name} does not read back as it was written")
    if problems:
        raise VerificationError(path=str(directory), problems=tuple(problems))
    return {region.name: checksum for region, checksum in zip(regions, checksums, strict=True)}


def _pinned(recipe: dict[str, Any], manifests: Sequence[Adapter]) -> dict[str, Any]:
    """Return a recipe that makes the same again: what is on the Hub by the commit that it had."""
    adapters = [
        adapter.path
        if adapter.origin is None
        else f"{adapter.path.partition('@')[0]}@{adapter.origin.commit}"
        for adapter in manifests
    ]
    return {**recipe, "adapters": adapters}


def _input(manifest: Adapter, read: tuple[int, str]) -> dict[str, Any]:
    """Return what an adapter was, with one checksum over all of its tensors that were read."""
    targets, checksum = read
    return {
        "path": manifest.path,
        **({} if manifest.origin is None else {"commit": manifest.origin.commit}),
        "base_model": manifest.config.base_model if manifest.config else None,
        "files": {Path(file.path).name: file.size for file in manifest.files},
        "targets_used": targets,
        "xxh3": checksum,
    }


def _pruned(cuts: Cuts, adapter: int) -> dict[str, Any]:
    """Return where an adapter was cut over all of its targets; nothing where it has none."""
    standings = cuts.standings.get(adapter)
    if not standings:
        return {}
    (*outliers, kept) = standings
    dropped = sum(one.keep for one in outliers)
    facts = {
        "threshold": _finite(kept.value(cuts.dtype)),
        "kept": kept.keep - dropped,
        "elements": kept.elements,
        "share": (kept.keep - dropped) / kept.elements if kept.elements else None,
    }
    for one in outliers:
        facts |= {"outliers_above": _finite(one.value(cuts.dtype)), "outliers": dropped}
    return {"pruning": facts}


def _finite(threshold: float) -> float | None:
    """Return a threshold; None where none is kept, or all."""
    return threshold if 0 <= threshold < math.inf else None


def _report(task: Task, receipt: Receipt) -> ModuleReport:
    certificate = receipt.certificate
    return ModuleReport(
        target=task.target,
        m=task.m,
        n=task.n,
        rank=task.rank,
        rank_reached=certificate is None or certificate.reached,
        adapters=task.last - task.first,
        route=task.route,
        kept_energy=certificate.kept_energy if certificate else None,
        relative_error=certificate.relative_error if certificate else None,
        excess=certificate.excess if certificate else None,
        converged=certificate.converged if certificate else True,
        device=receipt.device,
        directions=(certificate.directions or None) if certificate else None,
        basis_gap=certificate.gap if certificate else None,
        basis_unique=certificate is None or certificate.gap is None or certificate.gap >= BASIS_GAP,
        settled=receipt.unsettled == 0.0,
        last_step=receipt.unsettled or None,
    )


def _facts(report: ModuleReport) -> dict[str, Any]:
    return {name: value for name, value in asdict(report).items() if name != "target"}
