"""The page's colours: two scales that the colour-blind can read, on light and on dark ground."""

from __future__ import annotations

import math
from dataclasses import dataclass

STEPS = 25
"""Colours of a scale; odd, so that a diverging one has a middle."""

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Scale:
    """Values between two fixed limits, and what they look like."""

    name: str
    low: float
    high: float
    light: tuple[Colour, ...]
    """Anchors from low to high, on light ground."""
    dark: tuple[Colour, ...]
    percent: bool = True

    def step(self, value: float) -> int | None:
        """Return the number of a value's colour; None for what is no number."""
        if not math.isfinite(value):
            return None
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(share * (STEPS - 1))

    def colours(self, *, dark: bool) -> list[str]:
        """Return all colours as #rrggbb, from low to high."""
        anchors = self.dark if dark else self.light
        return [_hex(_between(anchors, step / (STEPS - 1))) for step in range(STEPS)]

    def text(self, value: float) -> str:
        """Return a value as the page shows it."""
        if not math.isfinite(value):
            return "–"
        return f"{value:.1%}" if self.percent else f"{value:+.3f}"


# Orange and blue are told apart with every common deficiency of colour vision.
_WARM, _COOL = ((179, 88, 6), (241, 163, 64)), ((103, 169, 207), (5, 80, 140))
_DIVERGING = {
    "light": (*_WARM, (244, 243, 240), *_COOL),
    "dark": ((255, 176, 92), (168, 98, 30), (40, 43, 50), (46, 110, 160), (122, 196, 255)),
}
_RISING = {
    "light": ((243, 242, 238), (158, 202, 190), (62, 138, 138), (14, 62, 78)),
    "dark": ((38, 41, 48), (28, 86, 92), (64, 158, 152), (196, 240, 222)),
}

COSINE = Scale("v", -1.0, 1.0, _DIVERGING["light"], _DIVERGING["dark"], percent=False)
SHARE = Scale("s", 0.0, 1.0, _RISING["light"], _RISING["dark"])
HALF = Scale("h", 0.0, 0.5, _RISING["light"], _RISING["dark"])
"""Shares that are a half at most, or by chance."""

SCALES = (COSINE, SHARE, HALF)


def css() -> str:
    """Return the rules for the classes v0 …, s0 … and h0 …, for both grounds."""
    light, dark = ("".join(_rules(scale, dark=d) for scale in SCALES) for d in (False, True))
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}"


def _rules(scale: Scale, *, dark: bool) -> str:
    return "".join(
        f".{scale.name}{step}{{fill:{colour};stroke:{colour}}}"
        for step, colour in enumerate(scale.colours(dark=dark))
    )


def _between(anchors: tuple[Colour, ...], share: float) -> Colour:
    place = share * (len(anchors) - 1)
    low = min(int(place), len(anchors) - 2)
    part = place - low
    r, g, b = (
        round((1 - part) * x + part * y)
        for x, y in zip(anchors[low], anchors[low + 1], strict=True)
    )
    return r, g, b


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)
