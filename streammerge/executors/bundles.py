"""Tasks in bundles: the nodes of the graph, for threads and for clusters."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.plans import Task

BUNDLES_PER_THREAD = 16
"""Small targets share a node of the graph; more nodes balance better and cost more scheduling."""

BUNDLE_SOURCES = 2**15
"""Factor pairs of a bundle at most: to a cluster's worker they travel with it, some 100 bytes
each."""


def bundles(tasks: Sequence[Task], threads: int) -> list[tuple[Task, ...]]:
    """Cut the tasks, in order, into bundles of about equal work."""
    share = sum(task.flops + task.read_bytes for task in tasks) / (threads * BUNDLES_PER_THREAD)
    result: list[list[Task]] = []
    room, sources = 0.0, 0
    for task in tasks:
        sources += task.last - task.first
        if room <= 0 or sources > BUNDLE_SOURCES or not result:
            result.append([])
            room, sources = share, task.last - task.first
        result[-1].append(task)
        room -= task.flops + task.read_bytes
    return [tuple(bundle) for bundle in result]


def node_name(bundle: Sequence[Task], number: int, what: str = "merge") -> str:
    """Return the name of a bundle's node, for people who watch it run."""
    more = f"+{len(bundle) - 1}" if len(bundle) > 1 else ""
    return f"{what}-{number:05d}-{bundle[0].target}{more}"
