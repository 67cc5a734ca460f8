"""The scaling of every target: alpha/r, or alpha/√r with rslora, where r is explained."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from streammerge.adapter import Adapter
from streammerge.errors import UnknownScalingError


def scalings(adapter: Adapter, policy: str | float | None) -> npt.NDArray[np.float64]:
    """Return the scaling of each of the adapter's targets.

    Args:
        adapter: the manifest.
        policy: for targets whose rank the config does not explain: "config", "tensor", a value,
            or None to refuse.

    Raises:
        UnknownScalingError: a scaling is unknown, and the policy does not settle it.
    """
    columns = adapter.columns
    power = columns.power.astype(np.float64)
    known = columns.declared_rank == columns.rank
    result = columns.alpha / columns.rank.astype(np.float64) ** power
    if known.all():
        return result
    if (columns.declared_rank == 0).any() and not isinstance(policy, float | int):
        raise _no_config(adapter, policy)
    if policy is None:
        raise _rank_unexplained(adapter, int(np.flatnonzero(~known)[0]))
    if policy == "config":
        declared = columns.declared_rank.astype(np.float64)
        result = np.where(known, result, columns.alpha / declared**power)
    elif policy != "tensor":
        result = np.where(known, result, float(policy))
    return result


def _no_config(adapter: Adapter, policy: str | float | None) -> UnknownScalingError:
    asked = "" if policy is None else f" (scaling={policy!r} needs the alpha of a config)"
    return UnknownScalingError(
        f"there is no adapter_config.json, so the scaling is unknown{asked}; give it as a number "
        "(alpha/r of the training), for example --scaling 1.0",
        path=adapter.path,
        tensor=adapter.factor(0, "A").key,
        declared_rank=None,
        found_rank=int(adapter.columns.rank[0]),
    )


def _rank_unexplained(adapter: Adapter, row: int) -> UnknownScalingError:
    declared, found = (int(adapter.columns.declared_rank[row]), int(adapter.columns.rank[row]))
    alpha = adapter.columns.alpha[row]
    return UnknownScalingError(
        f"has rank {found}, but the config says {declared} and no rank_pattern explains it, so "
        f"the scaling is unknown; choose --scaling config ({alpha:g} and rank {declared}), "
        f"--scaling tensor ({alpha:g} and rank {found}) or --scaling VALUE",
        path=adapter.path,
        tensor=adapter.factor(row, "A").key,
        declared_rank=declared,
        found_rank=found,
    )
