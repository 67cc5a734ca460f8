"""What a merge takes on many workers.

    scripts/scaling project  [--memory SIZE] [--file-system SIZE] [--link SIZE] [--latency SECONDS]
    scripts/scaling overhead [--targets N] [--profile]
    scripts/scaling speedup  [--repeats N]
    scripts/scaling shared   [--repeats N]

project measures the rates of one core (minutes), plans merges of models that are not here, and
prints what they would take on 1 to 1,000 workers and what bounds it. overhead merges 45,000 tiny
targets serially, on threads and on a cluster on loopback. speedup merges on one worker process and
on two; shared does so with one large target, which the two share. docs/scaling.md says what the
figures are. Some 1 GB of disk under --folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from atscale import overhead, speedup
from atscale.projection import Assumed, report
from streammerge.budget import parse_size


def main() -> None:
    """Measure what was asked for and print it."""
    options = parse()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if options.what == "project":
        print(report(folder, _assumed(options)))
    elif options.what == "overhead":
        run = overhead.profile if options.profile else overhead.measure
        print(run(folder, options.targets))
    else:
        layers = speedup.SHARED if options.what == "shared" else speedup.MANY
        print(speedup.measure(folder, layers, options.repeats))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/scaling", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["project", "overhead", "speedup", "shared"])
    parser.add_argument("--memory", default="16GiB", help="of each worker [16GiB]")
    parser.add_argument("--file-system", default="10GB", help="of all workers, a second [10GB]")
    parser.add_argument("--link", default="1GB", help="of a worker, a second [1GB]")
    parser.add_argument("--latency", type=float, default=1e-3, help="to another worker [0.001]")
    parser.add_argument("--targets", type=int, default=45_000, help="tiny ones [45000]")
    parser.add_argument(
        "--profile", action="store_true", help="where the client's time goes, instead"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of speedup and shared [3]")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/streammerge-scaling"))
    return parser.parse_args()


def _assumed(options: argparse.Namespace) -> Assumed:
    return Assumed(
        memory=parse_size(options.memory, option="--memory"),
        file_system=float(parse_size(options.file_system, option="--file-system")),
        link=float(parse_size(options.link, option="--link")),
        latency=options.latency,
    )


if __name__ == "__main__":
    main()
