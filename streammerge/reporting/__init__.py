"""The merge as a page: what was kept, what was lost, how the adapters agree, what it took."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streammerge.errors import CorruptFileError, RecipeError, StorageError
from streammerge.output.staging import MARK_NAME
from streammerge.reporting.figures import by_module, labels, matrices
from streammerge.reporting.material import gather
from streammerge.reporting.page import render
from streammerge.reporting.plots import check_matplotlib, write_plots
from streammerge.worker.agreement import Agreement

__all__ = ["Report", "report"]

PAGE_NAME = "report.html"


@dataclass(frozen=True)
class Report:
    """What was written about a merge, and what it says of the adapters."""

    page: Path
    """The HTML file."""
    plots: tuple[Path, ...]
    """The PNG files, where they were asked for."""
    adapters: tuple[str, ...]
    """Those that are in `agreement`, in the order of its rows; the merge comes after them."""
    missing: tuple[str, ...]
    """Why other adapters could not be compared, a sentence each."""
    agreement: Agreement | None
    """None where no input is left to compare."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it; what is no number is null."""
        found = None if self.agreement is None else asdict(self.agreement)
        return {
            "page": str(self.page),
            "plots": [str(path) for path in self.plots],
            "adapters": list(self.adapters),
            "missing": list(self.missing),
            "agreement": _plain(found),
        }


def report(
    output: str | os.PathLike[str],
    page: str | os.PathLike[str] = PAGE_NAME,
    *,
    plots: str | os.PathLike[str] | None = None,
    all_targets: bool = False,
    on_target: Callable[[int, int], None] = lambda _done, _total: None,
) -> Report:
    """Write a merge's report: one HTML page that loads nothing, and PNG files where asked for.

    Inputs are compared where they still lie unchanged; each is read once, or once for every pair of
    groups where one target's factors take more than 64 MiB. No delta is ever formed.

    Args:
        output: an output of streammerge, with its streammerge.json.
        page: file to write; replaced where it is there.
        plots: directory for the same figures as PNG files; needs the extra `plots`.
        all_targets: compare the adapters in all targets, however long it takes, and check every
            byte of theirs; else as many as a minute or a few allow.
        on_target: hears of each compared target: how many are done, and of how many.

    Raises:
        RefusedError: a subclass of it says why there is nothing to report on.
        MergeFailedError: an input changed or could not be read meanwhile, or the page cannot be
            written.
    """
    where = Path(page)
    if where.is_dir() or where.resolve().parent == Path(output).resolve():
        # `verify` knows every file of an output, and a page is none of them.
        raise RecipeError(f"{where}: name a file that lies outside of the output", option="page")
    if plots is not None:
        check_matplotlib()
    material = gather(Path(output), all_targets=all_targets, on_target=on_target)
    try:
        drawn: tuple[Path, ...] = ()
        if plots is not None:
            drawn = write_plots([*matrices(material), *by_module(material)], Path(plots))
        where.write_text(render(material), encoding="utf-8", errors="replace")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        path = str(Path(output) / MARK_NAME)
        raise CorruptFileError("is not a record of a merge", path=path) from error
    except OSError as error:
        path = str(error.filename or where)
        raise StorageError(f"cannot be written ({error.strerror})", path=path) from error
    names = labels(material)
    return Report(
        page=where,
        plots=drawn,
        adapters=tuple(names[position] for position in material.compared),
        missing=tuple(one.why for one in material.missing),
        agreement=material.agreement,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
