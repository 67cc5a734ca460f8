"""Fuzzes what is read of an adapter's directory: headers, configs, indices, records, odd files.

    scripts/fuzz [--cases N] [--seed S] [--only CASE] [--workers N]

Every case has to end in a clean error, or in a right answer: every factor inside its file, shapes
and dtypes that make its bytes, a plan or a refusal. Another exception, more than 2 s of processor
time, or more than 512 MiB is a fault. Real adapters join the corpus where $STREAMMERGE_ADAPTERS
names them. A fault is printed with its number; --only runs that case alone and shows its files.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random

from fuzzing import dialects
from fuzzing.corpus import real, synthetic
from fuzzing.directories import Directory, File
from fuzzing.judge import CLEAN, FAULT, MEMORY_BYTES, READ, Verdict, judge
from fuzzing.mutate import mutate, splice
from fuzzing.structured import GENERATORS, record

BATCH = 200
RECURSION = 20_000
"""For making deep cases; the package works under Python's own limit."""


@dataclass(frozen=True)
class Numbered:
    """A case's number, how it was made, and what became of it."""

    number: int
    kind: str
    verdict: Verdict


@dataclass
class Tally:
    """What was seen so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    faults: list[Numbered] = field(default_factory=list)
    slowest: Numbered | None = None
    largest: Numbered | None = None

    def add(self, case: Numbered) -> None:
        """Count a case."""
        self.outcomes[case.verdict.outcome] += 1
        self.kinds[case.kind.partition(":")[0]] += 1
        if case.verdict.outcome == CLEAN:
            self.words[case.verdict.words] += 1
        if case.verdict.outcome == FAULT:
            self.faults.append(case)
        if self.slowest is None or case.verdict.seconds > self.slowest.verdict.seconds:
            self.slowest = case
        if self.largest is None or case.verdict.grown_bytes > self.largest.verdict.grown_bytes:
            self.largest = case


@cache
def corpora() -> tuple[dict[str, Directory], dict[str, Directory]]:
    """Synthetic and real directories."""
    return synthetic() | dialects.sound(), real()


def make_case(seed: int, number: int, *, with_real: bool = True) -> tuple[str, Directory, Random]:
    """A case by its number, with its name, and the draws that are left for its plan."""
    random = Random(f"{seed}/{number}")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(RECURSION)
    try:
        kind, pieces = _make(random, with_real=with_real)
    finally:
        sys.setrecursionlimit(limit)
    return kind, pieces, random


def _make(random: Random, *, with_real: bool) -> tuple[str, Directory]:
    made, found = corpora()
    pool = found if found and with_real and random.random() < 0.4 else made
    name = random.choice(sorted(pool))
    way = random.random()
    if way < 0.5:
        generators = (*GENERATORS, *dialects.GENERATORS)
        generator = random.choices([g for _, g in generators], [n for n, _ in generators])[0]
        return f"structured:{generator.__name__}", generator(random)
    if way < 0.55:
        return "structured:record", record(random, made["output"])
    if way < 0.62:
        other = random.choice(sorted(made))
        return f"splice:{name}+{other}", splice(random, pool[name], made[other])
    return f"mutation:{name}", mutate(random, pool[name])


def run_batch(seed: int, numbers: Sequence[int], *, with_real: bool = True) -> list[Numbered]:
    """Run some cases in this process."""
    with tempfile.TemporaryDirectory() as place:
        return [run_case(Path(place) / "case", seed, n, with_real=with_real) for n in numbers]


def run_case(place: Path, seed: int, number: int, *, with_real: bool = True) -> Numbered:
    """Run one case in this process."""
    kind, pieces, random = make_case(seed, number, with_real=with_real)
    return Numbered(number, kind, judge(place, pieces, random))


def _limit_memory() -> None:
    """Have what takes much more than a case may end in an error, and not the machine."""
    with Path("/proc/self/statm").open() as stream:
        held = int(stream.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 4 * MEMORY_BYTES,) * 2)


def _run_all(seed: int, cases: int, workers: int) -> Iterator[Numbered]:
    batches = [range(start, min(start + BATCH, cases)) for start in range(0, cases, BATCH)]
    with ProcessPoolExecutor(workers, initializer=_limit_memory) as pool:
        for found in pool.map(run_batch, [seed] * len(batches), batches):
            yield from found


def main() -> int:
    """Run the cases that are asked for; the exit code says whether a fault was found."""
    options = _parse()
    if options.only is not None:
        return _show(options.seed, options.only)
    began, tally = time.perf_counter(), Tally()
    corpora()
    for case in _run_all(options.seed, options.cases, options.workers):
        tally.add(case)
        if case.verdict.outcome == FAULT and len(tally.faults) <= options.faults:
            print(f"fault: case {case.number} ({case.kind}): {case.verdict.words}", flush=True)
    _report(tally, options.seed, time.perf_counter() - began)
    return 1 if tally.faults else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100_000, help="how many [100000]")
    parser.add_argument("--seed", type=int, default=0, help="of all of them [0]")
    parser.add_argument("--only", type=int, metavar="CASE", help="one case, and its files")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--faults", type=int, default=50, help="how many are printed [50]")
    return parser.parse_args()


def _show(seed: int, number: int) -> int:
    kind, pieces, _ = make_case(seed, number)
    print(f"case {number}: {kind}")
    for name, piece in pieces.items():
        shown = (
            repr(piece.head[:3000]) + f", {piece.length} bytes"
            if isinstance(piece, File)
            else piece
        )
        print(f"{name}: {shown}")
    (found,) = run_batch(seed, [number])
    print(found.verdict)
    return 1 if found.verdict.outcome == FAULT else 0


def _report(tally: Tally, seed: int, seconds: float) -> None:
    made, found = corpora()
    print(f"cases          {tally.outcomes.total()} (seed {seed}): {_counts(tally.kinds)}")
    print(f"corpus         {len(made)} synthetic, {len(found)} real directories")
    print(f"clean errors   {tally.outcomes[CLEAN]}: {_counts(tally.words)}")
    print(f"correct reads  {tally.outcomes[READ]}")
    print(f"faults         {tally.outcomes[FAULT]}")
    print(f"seconds        {seconds:.0f}")
    if tally.slowest and tally.largest:
        slow, large = tally.slowest, tally.largest
        print(f"slowest        {slow.verdict.seconds:.2f} s: case {slow.number} ({slow.kind})")
        grown = large.verdict.grown_bytes / 2**20
        print(f"largest        {grown:.0f} MiB: case {large.number} ({large.kind})")


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


if __name__ == "__main__":
    sys.exit(main())
