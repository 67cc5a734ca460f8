"""Kills the real command line with SIGKILL at random moments, goes on, and compares the bytes.

    scripts/kill-test [--kills N] [--seed S] [--folder DIR]

Each round is one merge: a method, on one thread or two, into a new output or over an earlier one.
It is started with --resume, killed, and started again, until it ends by itself; its output must
then be that of a merge that nobody disturbed. After every kill the output's name must be as it was
before. 200 kills take about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from killing.rounds import Round, make_inputs, play


def main() -> None:
    """Play rounds until there were enough kills, and print what came of them."""
    parser = argparse.ArgumentParser(
        prog="scripts/kill-test",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=200, help="kills at least [200]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    parser.add_argument("--folder", type=Path, help="where the files go [a temporary directory]")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="kill-test-") as folder:
        inputs = make_inputs(Path(folder))
        number = 0
        while totals["kills"] < options.kills:
            each = Round.of(number, inputs, Path(folder) / f"{number}")
            found = play(each, draw)
            totals.update(found)
            print(f"{each}: {found['kills']} kills, {found['taken over']} targets taken over",
                  file=sys.stderr)  # fmt: skip
            number += 1
    print(f"{number} merges, {totals['kills']} kills: {totals['before']} before the work, "
          f"{totals['during']} during it; {totals['taken over']} targets were taken over; "
          "all outputs are those of undisturbed merges")  # fmt: skip


if __name__ == "__main__":
    main()
