"""The stages of deduplication as Ray tasks: sources are scanned and bands compared in parallel, on any node that sees
the files and the work folder. What goes between tasks is shards in the work folder and, by Ray, lists of rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsft.data.candidates import compared_texts
from fastsft.data.link import LinkOptions, band_buckets, equal_rows, limit_clusters, link_buckets, oversized, roots
from fastsft.data.problems import Problems
from fastsft.data.scan import SketchOptions, scan, scan_source
from fastsft.data.shards import Shard, Shards, by_source, open_shards
from fastsft.data.sources import Source
from fastsft.progress import Progress

Ints = npt.NDArray[np.int64]


def scan_on_ray(
    sources: Sequence[Source],
    options: SketchOptions,
    problems: Problems,
    *,
    folder: Path,
    memory: int,
    progress: Progress | None = None,
) -> Shards:
    """:func:`fastsft.data.scan.scan` with a task for each source."""
    made = by_source(folder)
    tasks = [
        (i, s, options, problems.mode, problems.skip, made.get(i, []), folder, memory) for i, s in enumerate(sources)
    ]
    for done, _ in enumerate(_run(_scan, tasks)):
        if progress:
            progress("reading files", done + 1, len(sources))
    return scan(sources, options, problems, folder=folder, memory=memory)  # finds all of them complete


def link_on_ray(
    sources: Sequence[Source],
    shards: Shards,
    options: SketchOptions,
    how: LinkOptions,
    *,
    memory: int,
    folder: Path,
    progress: Progress | None = None,
) -> tuple[Ints, Ints]:
    """:func:`fastsft.data.link.link` with a task for each band; the components of their links are joined here."""
    import ray

    first = equal_rows(shards, memory=memory)
    if options.mode == "exact":
        return first, first
    alone = first == np.arange(len(first))
    parent = np.arange(len(first))
    shared = ray.put(alone)
    bands = options.shape[0]
    tasks = [(band, list(sources), shared, options, how, folder, memory) for band in range(bands)]
    for done, (rows, heads) in enumerate(_run(_compare_band, tasks)):
        join(parent, rows, heads)
        if progress:
            progress("comparing", done + 1, bands)
    if how.max_cluster is not None:
        large = oversized(parent, how.max_cluster)
        rows = np.flatnonzero(large[roots(parent)] & alone)
        if len(rows):
            buckets = [band_buckets(shards, band, alone, memory=memory) for band in range(bands)]
            texts, compared = compared_texts(
                sources, shards, rows, options, how.verify, memory=memory // 8, folder=folder
            )  # fmt: skip
            limit_clusters(buckets, texts, parent, compared, how.max_cluster)
    return first, roots(parent)[first]


def join(parent: Ints, rows: Ints, heads: Ints) -> None:
    """Put the components of ``rows`` and ``heads``, pair by pair, together; the smallest row becomes the root."""
    while True:
        above = roots(parent)
        x, y = above[rows], above[heads]
        low, high = np.minimum(x, y), np.maximum(x, y)
        if np.array_equal(low, high):
            parent[:] = above
            return
        parent[:] = above
        np.minimum.at(parent, high, low)


def _run(function: Any, tasks: Sequence[tuple[Any, ...]]) -> Any:
    """The results in order. A task's own error is raised as it was raised there."""
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    remote = ray.remote(function)
    waiting = [remote.remote(*task) for task in tasks]
    try:
        for result in waiting:
            yield ray.get(result)
    except ray.exceptions.RayTaskError as error:
        for left in waiting:
            ray.cancel(left)
        raise error.cause from None


def _scan(
    index: int, source: Source, options: SketchOptions, mode: Any, skip: str | None, made: Sequence[Shard],
    folder: Path, memory: int,
) -> int:  # fmt: skip
    shards = scan_source(index, source, options, Problems(mode, skip), made, folder=folder, memory=memory)
    return sum(s.info.rows for s in shards)


def _compare_band(
    band: int, sources: Sequence[Source], alone: npt.NDArray[np.bool_], options: SketchOptions, how: LinkOptions,
    folder: Path, memory: int,
) -> tuple[Ints, Ints]:  # fmt: skip
    """Rows that this band connects to others, and the first row of each one's component."""
    shards = open_shards(folder)
    buckets = band_buckets(shards, band, alone, memory=memory)
    rows = np.unique(buckets.members)
    texts, compared = compared_texts(sources, shards, rows, options, how.verify, memory=memory // 8, folder=folder)
    parent = np.arange(len(alone))
    link_buckets([buckets], texts, parent, compared, None, memory=memory // 16)
    heads = roots(parent)
    moved = np.flatnonzero(heads != np.arange(len(heads)))
    return moved, heads[moved]
