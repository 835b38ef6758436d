"""Duplicates among the rows of files that need not fit in memory: scan, link, choose, write.

The stages hand each other :class:`fastsft.data.shards.Shards`, in memory or, with a work folder, on disk. There, an
interrupted run is taken up where it stopped: complete shards are not made again, everything behind them is made from
them. The result depends on the rows and the options alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from fastsft.data.compared import names_of
from fastsft.data.dedup import DedupReport
from fastsft.data.keep import Keep, cheapest
from fastsft.data.keep import check as check_choice
from fastsft.data.link import LinkOptions, link
from fastsft.data.lock import hold, remove_held
from fastsft.data.problems import Problems
from fastsft.data.scan import SketchOptions, scan
from fastsft.data.shards import Shards
from fastsft.data.sources import Source, find_sources
from fastsft.data.texts import reread_texts
from fastsft.data.writers import Output, check_target
from fastsft.files import sync
from fastsft.progress import Progress

Ints = npt.NDArray[np.int64]
UNLIMITED = 1 << 62
_VERSION = 3  # raise when shards of the same rows and options would differ


def dedup_files(
    paths: Sequence[Path],
    output: Path | None,
    problems: Problems,
    *,
    sketch: SketchOptions,
    how: LinkOptions,
    on: Sequence[str] | None = None,
    keep: Keep = "first",
    prefer: Sequence[Path] = (),
    score: str | None = None,
    memory: int | None = None,
    work: Path | None = None,
    engine: Literal["local", "ray"] = "local",
    progress: Progress | None = None,
) -> DedupReport:
    """Find duplicates among the rows of all files together, and write those kept.

    Args:
        paths: files, saved datasets, or folders of files.
        output: a file for one file, a dataset folder for a dataset, a folder of files of the same names for a folder or
            several paths. Rows keep their format and their order, lines their bytes.
        on: what is compared, as in :func:`fastsft.dedup`.
        keep, prefer, score: the row of a cluster that stays, as in :func:`fastsft.dedup`; ``prefer`` lists files among
            the sources, ``score`` names a field of numbers.
        memory: bytes that the stages may hold; None holds everything.
        work: folder for the stages' files, which are removed at the end; needed for a limit of memory.
        engine: "ray" runs the stages as tasks on the Ray cluster that is connected, or a new one on this machine; work
            and files must be in the same place on all of its nodes, and ``memory`` is of each task.

    Raises:
        DataError: unusable rows or files, an output that cannot take the rows, a file that changed meanwhile.
        ConfigError: another process uses the work folder.
        ValueError: options that do not go together, a name that is none.
    """
    check_choice(keep, prefer, score)
    sources, folder = find_all(paths, on=on, score=score)
    ranks = _ranks(sources, prefer)
    if keep in ("longest", "score"):
        sketch = dataclasses.replace(sketch, rating="length" if keep == "longest" else "score")
    plan = plan_of(sources, sketch, output)
    if output is not None:
        check_target(sources, output, folder=folder, ours=work is not None and _planned(work) == plan)
    limit = memory_left(memory)
    with _work_folder(work, plan) as stage:
        shards, first, labels = _find(sources, problems, sketch, how, limit, stage, engine, progress)
        kept = choose(labels, shards, keep, ranks)
        if output is not None:
            write_kept(sources, shards, kept, output, folder=folder, progress=progress)
        return report(sources, shards, first, labels, kept, sketch)


def _find(
    sources: Sequence[Source], problems: Problems, sketch: SketchOptions, how: LinkOptions, memory: int,
    stage: Path | None, engine: str, progress: Progress | None,
) -> tuple[Shards, Ints, Ints]:  # fmt: skip
    if engine == "local":
        shards = scan(sources, sketch, problems, folder=stage, memory=memory, progress=progress)
        return shards, *link(sources, shards, sketch, how, memory=memory, folder=stage, progress=progress)
    if stage is None:
        raise ValueError("dedup: work: expected a folder that all nodes of the Ray cluster see, got None")
    from fastsft.data.ray_engine import link_on_ray, scan_on_ray

    shards = scan_on_ray(sources, sketch, problems, folder=stage, memory=memory, progress=progress)
    return shards, *link_on_ray(sources, shards, sketch, how, memory=memory, folder=stage, progress=progress)


def memory_left(memory: int | None) -> int:
    """What the stages may hold: the limit less what the process has already."""
    if memory is None:
        return UNLIMITED
    with open("/proc/self/statm") as stream:
        resident = int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return max(memory - resident, memory // 8)


def find_all(
    paths: Sequence[Path], *, on: Sequence[str] | None = None, score: str | None = None
) -> tuple[list[Source], bool]:
    """The sources of all paths, and whether they go to a folder of files."""
    names = names_of(on)
    sources = [dataclasses.replace(s, on=names, score=score) for p in paths for s in find_sources(p)]
    return sources, len(paths) > 1 or (paths[0].is_dir() and sources[0].path != paths[0])


def _ranks(sources: Sequence[Source], prefer: Sequence[Path]) -> npt.NDArray[np.float64]:
    """float64 [sources]: the place of each in ``prefer``, those not in it last."""
    files = [s.path for s in sources]
    for path in prefer:
        if path not in files:
            raise ValueError(f"dedup: prefer: expected files among {', '.join(map(str, files[:10]))}, got {path}")
    return np.array([prefer.index(f) if f in prefer else len(prefer) for f in files], np.float64)


def choose(labels: Ints, shards: Shards, keep: Keep, ranks: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """One row of each cluster; ``ranks`` are those of the sources."""
    if keep == "first":
        return np.asarray(labels == np.arange(len(labels)))
    if keep == "source":
        counts = [s.info.rows for s in shards.shards]
        return cheapest(labels, np.repeat(ranks[[s.info.source for s in shards.shards]], counts))
    return cheapest(labels, -shards.read("ratings"))


def write_kept(sources: Sequence[Source], shards: Shards, kept: npt.NDArray[np.bool_], output: Path, *, folder: bool,
               base: int = 0, progress: Progress | None = None) -> None:  # fmt: skip
    """Write the rows kept of each source; ``base`` is the first one's number among those of the shards."""
    target = Output(output, folder=folder)
    for index, source in enumerate(sources):
        span = shards.of_source(base + index)
        rows = np.flatnonzero(kept[span]) + span.start
        target.write(source, shards.chosen("starts", rows), shards.chosen("sizes", rows))
        if progress:
            progress("writing files", index + 1, len(sources))
    target.finish()


def report(sources: Sequence[Source], shards: Shards, first: Ints, labels: Ints, kept: npt.NDArray[np.bool_],
           sketch: SketchOptions) -> DedupReport:  # fmt: skip
    """The report, whose places and texts are read from the files when they are asked for."""
    exact = int((first != np.arange(len(first))).sum())
    places = shards.loaded("numbers", "starts", "sizes")
    return DedupReport(
        kept, labels, exact, int((~kept).sum()) - exact,
        _Lazy(sources, places, sketch, "source"), _Lazy(sources, places, sketch, "text"),
    )  # fmt: skip


class _Lazy(Sequence[str]):
    """Places or texts of rows, looked up when asked for."""

    def __init__(self, sources: Sequence[Source], shards: Shards, sketch: SketchOptions, what: str) -> None:
        self._sources, self._shards, self._sketch, self._what = sources, shards, sketch, what

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        row = np.array([range(len(self))[at]])
        source = self._sources[self._shards.source_of(int(row[0]))]
        if self._what == "source":
            return f"{source.path}:{self._shards.chosen('numbers', row)[0]}"
        starts, sizes = self._shards.chosen("starts", row), self._shards.chosen("sizes", row)
        for batch in reread_texts(source, starts, sizes, fields=self._sketch.fields, batch_bytes=1):
            return batch.texts[0][batch.texts[1][0] : batch.texts[1][-1]].tobytes().decode()
        return ""


@contextmanager
def _work_folder(work: Path | None, plan: dict[str, Any]) -> Iterator[Path | None]:
    """The folder for shards, with those of an interrupted run of the same plan."""
    if work is None:
        yield None
        return
    with hold(work, "work"):
        shards = work / "shards"
        if _planned(work) != plan:
            (work / "plan.json").unlink(missing_ok=True)
            _discard(shards)
            write_json(work / "plan.json", plan)
        shards.mkdir(exist_ok=True)
        yield shards
        _discard(shards)
        (work / "plan.json").unlink()
        remove_held(work)


def _discard(shards: Path) -> None:
    """Under another name first: half of the shards is never taken for all of them."""
    trash = shards.with_name("trash")
    shutil.rmtree(trash, ignore_errors=True)
    if shards.exists():
        shards.replace(trash)
        shutil.rmtree(trash)


def _planned(work: Path) -> Any:
    path = work / "plan.json"
    return json.loads(path.read_text()) if path.is_file() else None


def write_json(path: Path, value: Any) -> None:
    """All of it or nothing."""
    stage = path.with_name(f"{path.name}.tmp")
    stage.write_text(json.dumps(value))
    sync(stage)
    stage.replace(path)
    sync(path.parent)


def plan_of(sources: Sequence[Source], sketch: SketchOptions, output: Path | None) -> dict[str, Any]:
    """What a run depends on, files by their path, size and time."""
    files = []
    for source in sources:
        for path in sorted(source.path.rglob("*")) if source.path.is_dir() else [source.path]:
            status = path.stat()
            files.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return {
        "version": _VERSION, "sketch": dataclasses.asdict(sketch), "files": files,
        "on": [s.on if s.on is None else list(s.on) for s in sources], "score": [s.score for s in sources],
        "output": str(output.resolve()) if output is not None else None,
    }  # fmt: skip
