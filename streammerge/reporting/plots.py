"""A report's figures as PNG files, drawn by matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError, printable
from streammerge.reporting.colours import Scale
from streammerge.reporting.drawing import short
from streammerge.reporting.figures import Figure

if TYPE_CHECKING:
    from matplotlib.colors import Colormap

DPI = 160
MAX_LABELS = 40
MAX_TICKS = 16


def check_matplotlib() -> None:
    """Check, before any work, that there is something to draw with.

    Raises:
        RecipeError: there is not.
    """
    try:
        import matplotlib  # noqa: F401, PLC0415  # an extra, and slow to load
    except ImportError as error:
        raise RecipeError(
            "plots are drawn by matplotlib, which is not installed; install the extra: "
            "pip install 'streammerge[plots]'",
            option="plots",
        ) from error


def write_plots(figures: Sequence[Figure], directory: Path) -> tuple[Path, ...]:
    """Draw each figure into a file of its own; return them.

    Raises:
        OSError: one cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    return tuple(_plot(figure, directory / f"{figure.name}.png") for figure in figures)


def _plot(figure: Figure, path: Path) -> Path:
    from matplotlib.figure import Figure as Canvas  # noqa: PLC0415  # an extra, and slow to load

    down, across = figure.values.shape
    size = (7.2, 6.4) if figure.square else (10.0, max(2.2, 1.4 + 0.28 * min(down, MAX_LABELS)))
    canvas = Canvas(figsize=size, layout="constrained")
    axes = canvas.subplots()
    image = axes.imshow(
        figure.values,
        cmap=_colours(figure.scale),
        vmin=figure.scale.low,
        vmax=figure.scale.high,
        aspect="equal" if figure.square else "auto",
        interpolation="nearest",
    )
    axes.set_title(figure.title, loc="left", fontweight="bold")
    if down <= MAX_LABELS:
        # A dollar would begin mathematics.
        names = [printable(short(row)).replace("$", r"\$") for row in figure.rows]
        axes.set_yticks(range(down), names)
    else:
        axes.set_yticks([])
    step = max(1, -(-across // (MAX_TICKS if figure.square else MAX_LABELS)))
    places = range(0, across, step)
    axes.set_xticks(places, [short(figure.columns[place], 8) for place in places])
    if not figure.square:
        axes.set_xlabel("layer")
    canvas.colorbar(image, ax=axes, shrink=0.8, label=" · ".join(filter(None, figure.words)))
    canvas.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def _colours(scale: Scale) -> Colormap:
    from matplotlib.colors import ListedColormap  # noqa: PLC0415  # an extra, and slow to load

    return ListedColormap(scale.colours(dark=False), name=scale.name).with_extremes(bad="#ffffff00")
