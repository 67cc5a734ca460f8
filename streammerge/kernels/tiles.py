"""Merged tiles: a rule applied to one tile of N tensors after another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from streammerge.catalog import Sparsity
from streammerge.draw import Drawer
from streammerge.kernels.each import Here, Over, Pool
from streammerge.kernels.thresholds import Band, Cut, Stream, find_band, find_threshold
from streammerge.registry import RULES
from streammerge.rules import Tile, function_of
from streammerge.tiling import sample_step

TileAt = Callable[[int, torch.Tensor], torch.Tensor]
"""From a tile's number and a flat buffer that is large enough to the flat tile, in the buffer."""


@dataclass(frozen=True)
class Operands:
    """N tensors of one shape, cut into the same tiles."""

    spans: Sequence[tuple[int, int]]
    """Each tile's range of flat indices."""
    fill: Callable[[int, int, torch.Tensor], torch.Tensor]
    """Puts tile t of tensor i into a flat buffer that is large enough, and returns it, flat."""
    sample: Callable[[int], torch.Tensor]
    """Returns elements that stand for tensor i."""
    width: int
    """Columns of the tensors."""
    new_buffer: Callable[[int], torch.Tensor]
    """Returns a flat buffer for so many elements."""
    keys: Sequence[int]
    """Each tensor's stream of random bits."""
    weights: Sequence[float]
    densities: Sequence[float]
    """Share of elements that the rule keeps of each tensor."""

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def largest_tile(self) -> int:
        """Elements of the largest tile."""
        return max(stop - start for start, stop in self.spans)


@dataclass(frozen=True)
class RuleOptions:
    """What of a recipe a rule needs."""

    rule: str
    majority_sign: str
    parameters: Mapping[str, float]
    """That the catalog names, each with its value."""


class MergedTiles:
    """The tiles of the merged tensor, made when they are asked for, from any thread.

    Thresholds over whole tensors are found first, by going over their tiles; after that any tile
    may be asked for, in any order and again, and is the same each time.
    """

    def __init__(self, operands: Operands, options: RuleOptions, *, stacked: bool) -> None:
        """Make it.

        Args:
            operands: the tensors.
            options: the rule and what it needs.
            stacked: whether the N tensors of a tile are kept while the rule goes over them again,
                instead of being made again.
        """
        self._operands = operands
        self._options = options
        self._stacked = stacked
        self._workspaces = Pool(lambda: _Workspace(operands))
        self.thresholds: tuple[Cut, ...] = ()
        """Where each tensor is cut, once that is known; none where it is found with the tile."""

    def find_thresholds(self, over: Callable[[int], Over]) -> None:
        """Find where tensors are cut, if the rule cuts them.

        Args:
            over: returns the panels of tensor i's stream.
        """
        rule = RULES[self._options.rule]
        # A tensor of one tile is read once: its threshold is found when it is there.
        there = len(self._operands.spans) == 1 and (self._stacked or rule.sweeps == 1)
        if rule.cuts and not there:
            self.thresholds = tuple(
                self._find_cut(i, self.stream(i), over(i)) for i in range(len(self._operands))
            )

    def __call__(self, t: int, out: torch.Tensor) -> torch.Tensor:
        """Write merged tile `t` into the head of a flat buffer and return it, flat."""
        options = self._options
        start, stop = self._operands.spans[t]
        with self._workspaces.lend() as space:
            space.stack = None
            tile = Tile(
                tensors=lambda: self._go_over(space, t, "none"),
                largest=lambda: self._go_over(space, t, "largest"),
                middle=lambda: self._go_over(space, t, "middle"),
                random=lambda: self._go_over(space, t, "random"),
                weights=self._operands.weights,
                majority_sign=options.majority_sign,
                parameters=options.parameters,
                out=out[: stop - start],
                spare=lambda k: space.spare(k)[: stop - start],
            )
            return _in_place(function_of(options.rule)(tile), tile.out)

    def stream(self, i: int) -> Stream:
        """Return tensor `i` for the search of its threshold."""

        def tiles(panel: range) -> Iterator[torch.Tensor]:
            with self._workspaces.lend() as space:
                for t in panel:
                    yield self._operands.fill(i, t, space.incoming(0))

        return Stream(self._operands.spans, tiles, lambda: self._operands.sample(i))

    def _go_over(self, space: _Workspace, t: int, kept: Sparsity) -> Iterator[torch.Tensor]:
        """Yield tile t of each tensor, with all, the largest or random elements kept."""
        if space.stack is not None and space.stack[0] == kept:
            yield from space.stack[1]
            return
        made = []
        for i in range(len(self._operands)):
            x = self._operands.fill(i, t, space.incoming(i if self._stacked else 0))
            if kept in ("largest", "middle"):
                x = self._prune_(space, i, t, x)
            elif kept == "random":
                x = self._drop_(space, i, t, x)
            made.append(x)
            yield x
        if self._stacked:
            space.stack = (kept, made)

    def _prune_(self, space: _Workspace, i: int, t: int, x: torch.Tensor) -> torch.Tensor:
        cut = self._cut(i, x)
        if isinstance(cut, Band):
            return cut.prune_(x, t, space.mask[: len(x)])
        return cut.prune_(x, t)

    def _cut(self, i: int, tile: torch.Tensor) -> Cut:
        if self.thresholds:
            return self.thresholds[i]
        step = sample_step(len(tile), self._operands.width)
        whole = Stream(self._operands.spans, lambda _: iter((tile,)), lambda: tile[::step])
        return self._find_cut(i, whole, Here(whole, 1, map))

    def _find_cut(self, i: int, stream: Stream, over: Over) -> Cut:
        density = self._operands.densities[i]
        if RULES[self._options.rule].sparsity == "middle":
            return find_band(stream, self._options.parameters["gamma"], density, over)
        return find_threshold(stream, density, over)

    def _drop_(self, space: _Workspace, i: int, t: int, x: torch.Tensor) -> torch.Tensor:
        """Keep random elements at the rate of the density, and divide them by it."""
        density = self._operands.densities[i]
        if density >= 1:
            return x
        if density <= 0:
            return x.zero_()
        key, (start, stop) = self._operands.keys[i], self._operands.spans[t]
        mask = space.drawer.mask(key, start, density, out=space.mask[: stop - start])
        return x.mul_(mask).div_(density)


def _in_place(answer: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return a rule's answer, which has to lie where it was told to put it.

    Any other tensor may be one of those that the next tile is made in.
    """
    if answer is not out and (answer.data_ptr(), answer.shape) != (out.data_ptr(), out.shape):
        raise TypeError("the answer is not in tile.out")
    return answer


class _Workspace:
    """Buffers of tile size for one tile in the making; made when first used, then used again."""

    def __init__(self, operands: Operands) -> None:
        self._new: Callable[[], torch.Tensor] = lambda: operands.new_buffer(operands.largest_tile)
        self._incoming: list[torch.Tensor] = []
        self._spare: list[torch.Tensor] = []
        self.stack: tuple[Sparsity, list[torch.Tensor]] | None = None
        """The N tensors of the tile, when they are kept."""

    def incoming(self, i: int) -> torch.Tensor:
        """Return the i-th buffer for a tensor on its way in."""
        return self._numbered(self._incoming, i)

    def spare(self, k: int) -> torch.Tensor:
        """Return the k-th buffer for the rule's own use."""
        return self._numbered(self._spare, k)

    @cached_property
    def mask(self) -> torch.Tensor:
        """The buffer for a mask of random elements, or for outliers."""
        return self._new()

    @cached_property
    def drawer(self) -> Drawer:
        """What draws the masks."""
        return Drawer(self.mask.numel(), self.mask.device)

    def _numbered(self, buffers: list[torch.Tensor], number: int) -> torch.Tensor:
        while len(buffers) <= number:
            buffers.append(self._new())
        return buffers[number]


class TileStore(Protocol):
    """Somewhere to put tiles that do not fit into memory."""

    def put(self, t: int, tile: torch.Tensor) -> None:
        """Store tile `t`, flat."""

    def get(self, t: int, out: torch.Tensor) -> torch.Tensor:
        """Read tile `t` as it was stored into the head of a flat buffer and return it."""


class HeldTiles:
    """Tiles of which some are made only once.

    Of those that are asked for the first `count` are held in memory, the next `stored` are put
    into the store; the others are made again each time.
    """

    def __init__(self, make: TileAt, count: int, store: TileStore | None, stored: int) -> None:
        self._make = make
        self._free = {"held": count, "stored": stored if store is not None else 0}
        self._store = store
        self._places: dict[int, str] = {}
        self._lock = threading.Lock()
        # Each tile is asked for by one thread at a time; entries of dictionaries are atomic.
        self._held: dict[int, torch.Tensor] = {}
        self._put: set[int] = set()

    def __call__(self, t: int, out: torch.Tensor) -> torch.Tensor:
        """Return tile `t`, flat; in `out` unless it is held."""
        place = self._places.get(t) or self._place(t)
        if place == "held":
            if t not in self._held:
                # Made in memory of its own: the buffer is needed for others.
                self._held[t] = self._make(t, torch.empty_like(out))
            return self._held[t]
        if place == "made":
            return self._make(t, out)
        assert self._store is not None, "tiles are only stored where there is a store"
        if t in self._put:
            return self._store.get(t, out)
        made = self._make(t, out)
        self._store.put(t, made)
        self._put.add(t)
        return made

    def _place(self, t: int) -> str:
        """Decide where a tile lies, for good."""
        with self._lock:
            place = next((name for name, free in self._free.items() if free > 0), "made")
            if place in self._free:
                self._free[place] -= 1
            self._places[t] = place
        return place
