"""Merged tiles: a rule applied to one tile of N tensors after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from streammerge.allocator import new_slab
from streammerge.catalog import Sparsity
from streammerge.draw import Drawer
from streammerge.kernels.each import Here, Over, Pool
from streammerge.kernels.ranks import drop_ranked_, rank_odds
from streammerge.kernels.selection import Selection, find_selection, squared, variance
from streammerge.kernels.thresholds import (
    Band,
    Cut,
    Quota,
    Stream,
    Threshold,
    find_band,
    find_threshold,
    place_cut,
)
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
    quotas: Sequence[Sequence[Quota]] | None = None
    """What each tensor keeps where it is cut together with others; None where on its own."""

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
        # The tensors that are kept, or the one in the making; what the rule works in.
        buffers = (len(operands) if stacked else 1) + RULES[options.rule].tile_buffers
        self._workspaces = Pool(lambda: _Workspace(operands, buffers))
        self.thresholds: tuple[Cut, ...] = ()
        """Where each tensor is cut, once that is known; none where it is found with the tile."""
        self.selection: Selection | None = None
        """What is kept of all tensors alike, once that is known; None where the rule does not ask
        for it."""

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

    def find_selection(self, variation: Over, tiles: Over) -> None:
        """Find what is kept of all tensors alike, if the rule keeps what varies most.

        Args:
            variation: the panels of the variance over the tensors.
            tiles: those of this.
        """
        if RULES[self._options.rule].joint_passes:
            density, count = self._operands.densities[0], len(self._operands)
            found = find_selection(self.variation(), density, count, variation, tiles)
            self.selection = found

    def __call__(self, t: int, out: torch.Tensor) -> torch.Tensor:
        """Write merged tile `t` into the head of a flat buffer and return it, flat."""
        options, chosen = self._options, self.selection
        start, stop = self._operands.spans[t]
        with self._workspaces.lend() as space:
            space.stack = None
            varied = self._select(space, t, chosen.cut) if chosen else "none"
            tile = Tile(
                tensors=lambda: self._go_over(space, t, "none"),
                largest=lambda: self._go_over(space, t, "largest"),
                middle=lambda: self._go_over(space, t, "middle"),
                random=lambda: self._go_over(space, t, "random"),
                ranked=lambda: self._go_over(space, t, "ranked"),
                varied=lambda: self._go_over(space, t, varied),
                shares=chosen.shares if chosen else (),
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

    def variation(self) -> Stream:
        """Return the variance over the tensors, for the search of its threshold."""
        operands = self._operands

        def tiles(panel: range) -> Iterator[torch.Tensor]:
            with self._workspaces.lend() as space:
                for t in panel:
                    space.stack = None
                    yield self._variance(space, t)

        def sample() -> torch.Tensor:
            # Places are the same in all tensors, or the sample is a bad one; that costs time alone.
            first = operands.sample(0)
            out, mean, part = (torch.empty_like(first) for _ in range(3))
            each = partial(map, operands.sample, range(len(operands)))
            return variance(each, len(operands), out=out, mean=mean, part=part)

        return Stream(operands.spans, tiles, sample)

    def squares(self, panel: range, cut: Threshold) -> torch.Tensor:
        """Return the sum of squares of each tensor over some tiles and the elements that vary most.

        Args:
            panel: which tiles.
            cut: of the variance.
        """
        sums = self._operands.new_buffer(0).new_zeros(len(self._operands), dtype=torch.float64)
        with self._workspaces.lend() as space:
            for t in panel:
                space.stack = None
                kept = self._select(space, t, cut)
                for i, x in enumerate(self._go_over(space, t, kept)):
                    sums[i] += squared(x)
        return sums

    def _select(self, space: _Workspace, t: int, cut: Threshold) -> Sparsity:
        """Mark in the mask which elements of tile t vary most; return how tensors are gone over."""
        if cut.value < 0:
            return "none"
        cut.mask_(self._variance(space, t), t)
        return "varied"

    def _variance(self, space: _Workspace, t: int) -> torch.Tensor:
        """Return the variance over the tensors of the elements of tile t, in the mask's buffer."""
        start, stop = self._operands.spans[t]
        out, mean, part = (x[: stop - start] for x in (space.mask, space.spare(0), space.spare(1)))
        each = partial(self._go_over, space, t, "none")
        return variance(each, len(self._operands), out=out, mean=mean, part=part)

    def _go_over(self, space: _Workspace, t: int, kept: Sparsity) -> Iterator[torch.Tensor]:
        """Yield tile t of each tensor, with the elements kept that a rule asks for."""
        if space.stack is not None and space.stack[0] == kept:
            yield from space.stack[1]
            return
        there = space.stack[1] if space.stack is not None and space.stack[0] == "none" else None
        # What is there is worked on in place.
        space.stack, made = None, []
        for i in range(len(self._operands)):
            if there is not None:
                x = there[i]
            else:
                x = self._operands.fill(i, t, space.incoming(i if self._stacked else 0))
            if kept in ("largest", "middle"):
                x = self._prune_(space, i, t, x)
            elif kept == "random":
                x = self._drop_(space, i, t, x)
            elif kept == "ranked":
                x = self._drop_ranked_(space, i, t, x)
            elif kept == "varied":
                x.mul_(space.mask[: len(x)])
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
        if self._operands.quotas is not None:
            return place_cut(self._operands.quotas[i], over)
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

    def _drop_ranked_(self, space: _Workspace, i: int, t: int, x: torch.Tensor) -> torch.Tensor:
        """Keep random elements of whole rows, larger ones at higher rates, divided by these."""
        operands, epsilon = self._operands, self._options.parameters["epsilon"]
        odds = rank_odds(operands.width, operands.densities[i], epsilon, x)
        key, start = operands.keys[i], operands.spans[t][0]
        return drop_ranked_(x, odds, space.drawer, key, start, mask=space.mask[: len(x)])


def _in_place(answer: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return a rule's answer, which has to lie where it was told to put it.

    Any other tensor may be one of those that the next tile is made in.
    """
    if answer is not out and (answer.data_ptr(), answer.shape) != (out.data_ptr(), out.shape):
        raise TypeError("the answer is not in tile.out")
    return answer


class _Workspace:
    """Buffers of tile size for one tile in the making; made when first used, then used again."""

    def __init__(self, operands: Operands, count: int) -> None:
        """Make it.

        Args:
            operands: the tensors.
            count: buffers in one slab; what is asked for beyond them has memory of its own.
        """
        self._operands = operands
        self._count = count
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
    def _slab(self) -> Iterator[torch.Tensor]:
        """The buffers that are not in use yet."""
        return iter(new_slab(self._operands.new_buffer, self._operands.largest_tile, self._count))

    def _new(self) -> torch.Tensor:
        free = next(self._slab, None)
        return self._operands.new_buffer(self._operands.largest_tile) if free is None else free

    @cached_property
    def mask(self) -> torch.Tensor:
        """The buffer for a mask, or for outliers."""
        return self._new()

    @cached_property
    def drawer(self) -> Drawer:
        """What draws the masks."""
        return Drawer(self.mask.numel(), self.mask.device)

    def _numbered(self, buffers: list[torch.Tensor], number: int) -> torch.Tensor:
        while len(buffers) <= number:
            buffers.append(self._new())
        return buffers[number]
