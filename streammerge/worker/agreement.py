"""How adapters agree with one another and with their merge, one target after another.

Of a target all deltas are held as singular triples while they fit into GROUP_BYTES; more are taken
in groups, each pair of which meets once, and are then read again for every other group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from streammerge.adapter import Adapter
from streammerge.allocator import steady_allocator
from streammerge.kernels import agreement as kernel
from streammerge.kernels.spectra import Triples, triples
from streammerge.readers.windows import OpenFiles, Window, mapped
from streammerge.worker.factors import FactorReader, source_checksum
from streammerge.worker.job import one_thread_each

GROUP_BYTES = 64 * 1024**2
"""Of float64 triples in a group; two groups are held, and as much again while one is made."""

GROUP_COLUMNS = 2048
"""Singular vectors in a group at most, lest the products of two groups outgrow them."""

SAMPLE_ELEMENTS = 2**20
"""Elements of all deltas of a target that signs are counted on, together."""

MOST_ELEMENTS, FEWEST_ELEMENTS = 2**15, 2**10
"""The same of one delta."""

SAMPLE_ROWS = 8
"""Rows of a delta that are sampled at least, where it has so many."""

_MODULUS = 2**128
_CPU = torch.device("cpu")

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Member:
    """One adapter that is compared, or the merge itself."""

    adapter: Adapter
    scalings: npt.NDArray[np.float64]
    """By its rows."""
    weights: npt.NDArray[np.float64]
    """Its part in the merge, by its rows; 0 for the merge itself."""


@dataclass(frozen=True)
class Meeting:
    """One target and who has it: members by position, each with its row."""

    target: str
    members: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TargetAgreement:
    """What was found in one target. NaN where nothing is there to compare."""

    target: str
    """The module's path."""
    norms: tuple[float, ...]
    """‖Δ_i‖_F of every member, the merge last; NaN for those that do not have the target."""
    cosine: float
    """Mean over the pairs of adapters."""
    with_merged: float
    """Mean cosine of the adapters with the merge."""
    minority: float
    """Share of the weighted mass that pulls against the sum's sign, on the sample."""
    columns: float
    """Mean overlap of the adapters' column spaces."""
    rows: float
    """Mean overlap of their row spaces."""


@dataclass(frozen=True)
class Agreement:
    """Every pair of members over all targets; matrices are members × members, the merge last."""

    cosine: Matrix
    """Of what each is as a whole: all its targets' deltas as one vector."""
    conflict: Matrix
    """Share of sampled elements, zero in neither, whose signs differ."""
    columns: Matrix
    """Mean overlap of column spaces over the targets that both have."""
    rows: Matrix
    """The same of row spaces."""
    targets: tuple[TargetAgreement, ...]
    """Each compared target by itself, in the order of their names."""
    checksums: tuple[tuple[int, str], ...]
    """Of each member: how many targets were read, and the checksum that a merge records of them."""


class _Sums:
    """What is added up over targets."""

    def __init__(self, members: int) -> None:
        shape = (members, members)
        self.inner, self.differ, self.both, self.columns, self.rows, self.met = (
            np.zeros(shape) for _ in range(6)
        )
        self.checksums = [0] * members
        self.read = [0] * members


def agree(
    members: Sequence[Member],
    meetings: Sequence[Meeting],
    on_target: Callable[[str], None] = lambda _: None,
) -> Agreement:
    """Compare all members in all these targets; the last member is the merge.

    Memory: some 4·GROUP_BYTES, or 40·r·(m + n) bytes of one delta where that is more.

    Raises:
        NonFiniteError: an input holds NaN or infinity.
        InputChangedError, InputUnreadableError: a file is not the one whose header was read.
    """
    steady_allocator()
    sums, found = _Sums(len(members)), []
    with one_thread_each(), torch.inference_mode(), closing(OpenFiles()) as files:
        window = mapped(files)
        for meeting in meetings:
            found.append(_Target(members, meeting, window).add_to(sums))
            on_target(meeting.target)
    norms = np.sqrt(sums.inner.diagonal())
    with np.errstate(invalid="ignore", divide="ignore"):
        return Agreement(
            cosine=_clipped(sums.inner / np.outer(norms, norms)),
            conflict=sums.differ / sums.both,
            columns=sums.columns / sums.met,
            rows=sums.rows / sums.met,
            targets=tuple(found),
            checksums=tuple(
                (n, f"{total:032x}") for n, total in zip(sums.read, sums.checksums, strict=True)
            ),
        )


class _Target:
    """One target on its way through the comparison."""

    def __init__(self, members: Sequence[Member], meeting: Meeting, window: Window) -> None:
        self._members, self._meeting, self._window = members, meeting, window
        self.positions = np.array([position for position, _ in meeting.members])
        count = len(self.positions)
        position, row = meeting.members[0]
        columns = members[position].adapter.columns
        self._m, self._n = int(columns.m[row]), int(columns.n[row])
        ranks = [int(members[p].adapter.columns.rank[r]) for p, r in meeting.members]
        self._k = min(self._m, self._n, max(ranks))
        self._inner, self._columns, self._rows = (np.zeros((count, count)) for _ in range(3))
        each = min(MOST_ELEMENTS, max(FEWEST_ELEMENTS, SAMPLE_ELEMENTS // count))
        width = min(self._n, max(1, each // min(self._m, SAMPLE_ROWS)))
        self._sampled_rows = kernel.spread(self._m, max(1, each // width))
        self._sampled_columns = kernel.spread(self._n, width)
        self._sample = torch.zeros(count, len(self._sampled_rows) * width)

    def add_to(self, sums: _Sums) -> TargetAgreement:
        """Read the target, add what was found to the sums, and return what it is by itself."""
        groups = self._groups()
        for number, group in enumerate(groups):
            stack = self._load(group, sums)
            self._compare(group, stack, group, stack)
            for other in groups[number + 1 :]:
                self._compare(group, stack, other, self._load(other, None))
        differ, both = (counts.numpy() for counts in kernel.sign_counts(self._sample))
        here = np.ix_(self.positions, self.positions)
        met = ~np.isnan(self._columns)
        sums.inner[here] += self._inner
        sums.differ[here] += differ
        sums.both[here] += both
        sums.columns[here] += np.where(met, self._columns, 0.0)
        sums.rows[here] += np.where(met, self._rows, 0.0)
        sums.met[here] += met
        return self._summary()

    def _groups(self) -> list[range]:
        count = min(GROUP_BYTES // (8 * self._k * (self._m + self._n)), GROUP_COLUMNS // self._k)
        step = max(1, count)
        total = len(self.positions)
        return [range(start, min(total, start + step)) for start in range(0, total, step)]

    def _load(self, group: range, sums: _Sums | None) -> kernel.Stack:
        """Read a group's deltas; the first time with their sample and checksums."""
        return kernel.Stack.of([self._delta(place, sums) for place in group], self._k)

    def _delta(self, place: int, sums: _Sums | None) -> Triples:
        position, row = self._meeting.members[place]
        member = self._members[position]
        scaling = float(member.scalings[row])
        a, b = (
            FactorReader(
                self._window,
                member.adapter.factor(row, side),
                torch.float64,
                _CPU,
                None,
                hashed=sums is not None,
            )
            for side in "AB"
        )
        whole_a, whole_b = a.whole(), b.whole().mul_(scaling)
        if sums is not None:
            rows, columns = whole_b[self._sampled_rows], whole_a[:, self._sampled_columns]
            self._sample[place] = (rows @ columns).flatten()
            digest = source_checksum(self._meeting.target, scaling, a, b)
            sums.checksums[position] = (sums.checksums[position] + int(digest, 16)) % _MODULUS
            sums.read[position] += 1
        return triples(whole_b, whole_a)

    def _compare(
        self, group: range, stack: kernel.Stack, other: range, with_stack: kernel.Stack
    ) -> None:
        met = kernel.meet(stack, with_stack)
        for mine, found in (
            (self._inner, met.inner),
            (self._columns, met.columns),
            (self._rows, met.rows),
        ):
            values = found.numpy()
            mine[group.start : group.stop, other.start : other.stop] = values
            mine[other.start : other.stop, group.start : group.stop] = values.T

    def _summary(self) -> TargetAgreement:
        merge = len(self._members) - 1
        adapters = self.positions != merge
        norms = np.full(len(self._members), np.nan)
        own = np.sqrt(self._inner.diagonal())
        norms[self.positions] = own
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = _clipped(self._inner / np.outer(own, own))
        weights = torch.tensor([self._members[p].weights[row] for p, row in self._meeting.members])
        against, all_of_it = kernel.minority_mass(self._sample * weights[:, None])
        return TargetAgreement(
            target=self._meeting.target,
            norms=tuple(norms.tolist()),
            cosine=_mean(_pairs(cosine, adapters)),
            with_merged=_mean(cosine[np.ix_(adapters, ~adapters)].ravel()),
            minority=against / all_of_it if all_of_it else float("nan"),
            columns=_mean(_pairs(self._columns, adapters)),
            rows=_mean(_pairs(self._rows, adapters)),
        )


def flops(members: int, rank: int, m: int, n: int) -> float:
    """Return about how many operations the comparison of one target takes."""
    width = members * rank
    each = min(MOST_ELEMENTS, max(FEWEST_ELEMENTS, SAMPLE_ELEMENTS // members))
    return 2.0 * (m + n) * width * (width + 4 * rank) + 4.0 * members**2 * each


def _pairs(matrix: Matrix, chosen: npt.NDArray[np.bool_]) -> Matrix:
    """Return what stands above the diagonal, of the chosen rows and columns."""
    part = matrix[np.ix_(chosen, chosen)]
    return np.asarray(part[np.triu_indices(len(part), 1)])


def _mean(values: Matrix) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _clipped(cosine: Matrix) -> Matrix:
    """Return cosines without the rounding that leads beyond 1."""
    return np.clip(cosine, -1.0, 1.0)
