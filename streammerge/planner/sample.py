"""Some targets that stand for all: evenly over the kinds of modules, and over the depth."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from streammerge.adapter import Adapter
from streammerge.planner.align import Alignment, check_shapes, gather
from streammerge.planner.make import output_dtype, resolve_method
from streammerge.ranks import RankPolicy
from streammerge.recipe import Recipe

_NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.|$)|^\d{1,9}(?=\.|$)")


def kind_of(target: str) -> str:
    """Return a target's name without the numbers of layers, experts and blocks in it."""
    return _NUMBER.sub("*", target)


def sample_targets(targets: Sequence[str], count: int, seed: int) -> list[str]:
    """Return at most `count` of the targets, in their order.

    Every kind of module gets as many as any other, as far as it has them; those of one kind are
    evenly spaced over its layers, and those of different kinds are shifted against one another, so
    that together they lie all over the depth. The seed decides which kinds come first, and shifts
    all of them.

    Args:
        targets: names of modules, all different.
        count: at least 1.
        seed: another seed gives another sample.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for target in sorted(targets, key=_by_number):
        kinds[kind_of(target)].append(target)
    order = sorted(kinds, key=lambda kind: _draw(seed, kind))
    shares = _shares([len(kinds[kind]) for kind in order], count)
    turn = _draw(seed, "") / 2**64
    chosen = set()
    for place, (kind, share) in enumerate(zip(order, shares, strict=True)):
        shift = (turn + (place + 0.5) / len(order)) % 1.0
        chosen |= {kinds[kind][int((i + shift) * len(kinds[kind]) / share)] for i in range(share)}
    return [target for target in targets if target in chosen]


def pinned(recipe: Recipe, adapters: Sequence[Adapter], alignment: Alignment) -> Recipe:
    """Return a recipe that means for some of the targets what it means for all of them.

    Rank and dtype are those of all inputs where nothing was said.

    Args:
        recipe: what was asked for.
        adapters: with all of their targets.
        alignment: of all targets.

    Raises:
        IncompatibleError: the adapters do not fit together in one of the targets.
    """
    _, space = resolve_method(recipe)
    check_shapes(adapters, alignment, equal_ranks=space.equal_ranks)
    largest = int(gather(adapters, alignment, "rank").max()) if space.truncates else None
    dtype = output_dtype(adapters, alignment, recipe.dtype)
    rank = recipe.rank
    if isinstance(rank, RankPolicy):
        rank = replace(rank, largest=rank.largest or largest)
    return replace(recipe, rank=rank or largest, dtype=dtype)


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """Return how many of each kind are taken: equally many, the first ones one more."""
    shares = [0] * len(sizes)
    left = min(count, sum(sizes))
    while left:
        for place, size in enumerate(sizes):
            if left and shares[place] < size:
                shares[place] += 1
                left -= 1
    return shares


def _by_number(target: str) -> list[tuple[int, str]]:
    """Return what sorts names as their layers follow one another: 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in target.split(".")]


def _draw(seed: int, kind: str) -> int:
    digest = hashlib.blake2b(f"{seed} {kind}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
