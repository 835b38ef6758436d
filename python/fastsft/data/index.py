"""A folder that remembers rows, so that new files are compared with all earlier ones without reading those again.

It keeps the shards of the stages, signatures included (about 700 bytes a row), and a label for each row.
``index.json``, replaced in one step, says what counts: what an interrupted run left beside it is taken up by the same
run and ignored by any other. Rows of earlier files are read again only where they are candidates, by their place, and
compared with their digest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastsft.data.dedup import DedupReport
from fastsft.data.dedup_files import find_all, memory_left, plan_of, report, write_json, write_kept
from fastsft.data.link import LinkOptions, equal_rows, link
from fastsft.data.lock import hold
from fastsft.data.problems import DataError, Problems
from fastsft.data.scan import SketchOptions, scan
from fastsft.data.shards import Shards, open_shards
from fastsft.data.sources import Source
from fastsft.data.writers import check_target
from fastsft.files import sync
from fastsft.progress import Progress

_VERSION = 5


def dedup_with_index(
    paths: Sequence[Path],
    output: Path | None,
    problems: Problems,
    index: Path,
    *,
    sketch: SketchOptions,
    how: LinkOptions,
    on: Sequence[str] | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> DedupReport:
    """Keep the rows of new files that have no duplicate in the index or before them, and add all of them to it.

    The clusters are those of all files in one run; which of a cluster is kept is decided when its file comes, so that
    two rows kept earlier stay so when a later one turns out to be similar to both. The report is about the new rows;
    labels below 0 mean a row of the index. The same command, after an interruption, gives the same.

    Raises:
        DataError: as :func:`fastsft.data.dedup_files.dedup_files`; an index made with other options; a file that is in
            the index already; with exact verification, an earlier file that is gone or changed.
        ConfigError: another process uses the index.
    """
    if how.max_cluster is not None:
        raise ValueError("dedup: max_cluster: expected None with an index, whose clusters grow")
    sketch = dataclasses.replace(sketch, keep_signatures=True)
    sources, folder = find_all(paths, on=on)
    with hold(index, "index"):
        state = _read(index, _options(sketch, sources[0].on))
        pending = index / "pending.json"
        begun = json.loads(pending.read_text()) if pending.is_file() else {}
        plan = plan_of(sources, sketch, output)
        base = len(state["files"])
        committed = begun.get("base", base) < base and begun == {**plan, "base": begun["base"]}
        if committed:  # a run of the same command was killed behind its commit
            base = begun["base"]
        plan["base"] = base
        resumed = begun == plan
        known = [Source(Path(f["path"]), f["kind"], f["fields"], sources[0].on) for f in state["files"][:base]]
        earlier = {s.path for s in known}
        for source in sources:
            if source.path.resolve() in earlier:
                raise DataError(f"{source.path}: is in the index {index} already")
        if output is not None:
            check_target(sources, output, folder=folder, ours=resumed)
        if not resumed:
            _forget(index / "shards", base)
            write_json(pending, plan)
        old = Shards([s for s in open_shards(index / "shards").shards if s.info.source < base])
        limit = memory_left(memory)
        new = scan(
            sources, sketch, problems, folder=index / "shards", memory=min(limit, 1 << 32), base=base, progress=progress
        )
        shards = Shards([*old.shards, *new.shards])
        labels = np.fromfile(index / state["labels"], "<i8") if state["labels"] else np.empty(0, np.int64)
        if committed:
            first = equal_rows(shards, memory=limit)
        else:
            first, labels = link(
                [*known, *sources], shards, sketch, how, memory=limit, folder=index, known=labels, progress=progress
            )
        kept = labels == np.arange(len(labels))
        if output is not None:
            write_kept(sources, shards, kept, output, folder=folder, base=base, progress=progress)
        if not committed:
            _commit(index, state, sources, sketch, labels)
        _tidy(index, labels=_labels_name(base + len(sources)))
        n = len(old)
        return report(sources, Shards(_renumbered(new, base)), first[n:] - n, labels[n:] - n, kept[n:], sketch)


def _renumbered(shards: Shards, base: int) -> list[Any]:
    return [s.with_source(s.info.source - base) for s in shards.shards]


def _read(index: Path, options: dict[str, Any]) -> dict[str, Any]:
    (index / "shards").mkdir(exist_ok=True)
    path = index / "index.json"
    if not path.is_file():
        return {"files": [], "labels": None}
    state: dict[str, Any] = json.loads(path.read_text())
    if state["version"] != _VERSION:
        raise DataError(f"{index}: an index of version {state['version']}, expected {_VERSION}")
    for name, value in options.items():
        if state["options"][name] != value:
            raise DataError(f"{index}: made with {name} = {state['options'][name]!r}, got {value!r}")
    return state


def _options(sketch: SketchOptions, on: Sequence[str] | None) -> dict[str, Any]:
    names = ("mode", "threshold", "num_perm", "ngram", "unit", "seed")
    return {**{name: getattr(sketch, name) for name in names}, "on": None if on is None else list(on)}


def _forget(shards: Path, base: int) -> None:
    """Remove what another run left."""
    for path in sorted(shards.glob("*.shard"), reverse=True):
        if int(path.name.partition("-")[0]) >= base:
            path.unlink()


def _commit(index: Path, state: dict[str, Any], sources: Sequence[Source], sketch: SketchOptions, labels: Any) -> None:
    name = _labels_name(len(state["files"]) + len(sources))
    labels.astype("<i8").tofile(index / name)
    sync(index / name)
    fields = dict(sketch.fields)
    added = [{"path": str(s.path.resolve()), "kind": s.kind, "fields": fields} for s in sources]
    files = [*state["files"], *added]
    options = _options(sketch, sources[0].on)
    write_json(index / "index.json", {"version": _VERSION, "options": options, "files": files, "labels": name})


def _labels_name(files: int) -> str:
    return f"labels-{files:06d}.bin"


def _tidy(index: Path, *, labels: str) -> None:
    """Remove what a run that is through leaves: the labels of those before it, its plan last."""
    for path in index.glob("labels-*.bin"):
        if path.name != labels:
            path.unlink()
    (index / "pending.json").unlink()
