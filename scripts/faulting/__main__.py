"""Makes the file system fail under the real command line, goes on, and compares the bytes.

    scripts/fault-test [--cases N] [--seed S] [--folder DIR]

Each case is one merge in which one call fails, or all from that one on: open, read, write, fsync,
allocation, rename, unlink, rmdir, mkdir; with EIO, ENOSPC and others, and reads and writes that are
cut short. The merge must end with its output or with an error that says what failed, and leave the
output's name as it was; gone on with, it must give the bytes of an undisturbed one and leave
nothing beside it. A C compiler builds what makes calls fail. 500 cases take half an hour on two
cores.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from faulting.cases import Bench, draw_case


def main() -> None:
    """Play cases and print what came of them."""
    parser = argparse.ArgumentParser(
        prog="scripts/fault-test",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=500, help="how many [500]")
    parser.add_argument("--seed", type=int, default=0, help="of the cases [0]")
    parser.add_argument("--folder", type=Path, help="where the files go [a temporary directory]")
    options = parser.parse_args()
    draw, totals, wrong = random.Random(options.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="fault-test-") as folder:
        bench = Bench(Path(folder))
        for number in range(options.cases):
            merge, fault = draw_case(draw, bench)
            try:
                found = bench.play(merge, fault)
            except AssertionError as error:
                wrong += 1
                found = f"WRONG: {error}"
            totals[found.split(":")[0]] += 1
            print(f"{number}: {merge}; {fault}: {found}", file=sys.stderr)
    print(
        f"{options.cases} merges with a fault: "
        + ", ".join(f"{count} {what}" for what, count in totals.most_common())
    )
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
