"""Which record of a cluster of duplicates stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fastsft.data.records import Record

Keep = Literal["first", "longest", "source", "score"]


def choose(
    records: Sequence[Record],
    labels: npt.NDArray[np.int64],
    texts: Sequence[str],
    keep: Keep,
    *,
    prefer: Sequence[str] = (),
    score: Callable[[Record], float] | None = None,
) -> npt.NDArray[np.bool_]:
    """bool [N]: the best record of each cluster; among equally good ones the first.

    Args:
        labels: int64 [N], equal for the members of a cluster.
        keep: "first"; "longest" text in characters; "source": from the file that comes first in ``prefer``, those not
            in it last; "score": the highest score, by default the record's weight.
    """
    check(keep, prefer, score)
    rows = np.arange(len(labels))
    if keep == "first":
        cost = np.zeros(len(rows))
    elif keep == "longest":
        cost = -np.fromiter(map(len, texts), np.float64, len(rows))
    elif keep == "source":
        rank = {name: i for i, name in enumerate(prefer)}
        files = (r.source.rpartition(":")[0] for r in records)
        cost = np.fromiter((rank.get(file, len(rank)) for file in files), np.float64, len(rows))
    else:
        cost = -np.fromiter((r.weight if score is None else score(r) for r in records), np.float64, len(rows))
        if np.isnan(cost).any():
            where = records[int(np.flatnonzero(np.isnan(cost))[0])].source
            raise ValueError(f"dedup: score: expected a number for every record, got NaN for {where}")
    return cheapest(labels, cost)


def check(keep: Keep, prefer: Sequence[object], score: object) -> None:
    """Refuse options that do not go together."""
    if keep not in get_args(Keep):
        raise ValueError(f"dedup: keep: expected one of {get_args(Keep)}, got {keep!r}")
    if (keep == "source") != bool(prefer):
        raise ValueError(f"dedup: prefer: expected files with keep='source' and only then, got {prefer!r}")
    if score is not None and keep != "score":
        raise ValueError(f"dedup: score: expected with keep='score' only, got keep={keep!r}")


def cheapest(labels: npt.NDArray[np.int64], cost: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """bool [N]: of the rows with the same label the one of least cost, the first of several."""
    rows = np.arange(len(labels))
    order = np.lexsort((rows, cost, labels))
    best = np.ones(len(rows), np.bool_)
    best[1:] = np.diff(labels[order]) != 0
    kept = np.zeros(len(rows), np.bool_)
    kept[order[best]] = True
    return kept
