"""Records to a store on disk, shard by shard: little memory, and what a killed process had finished is not done again.

A shard is a store of its own, made from a fixed number of records, and the report of what was wrong with them. Shards
are tokenised by several threads that take the next one when they are free (the tokenizer works outside of Python's
lock), are written in order, and in the end joined: the bytes do not depend on threads and interruptions.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastsft.config import Config
from fastsft.data.batch import Sample
from fastsft.data.problems import Problems
from fastsft.data.records import Record
from fastsft.data.store import SampleStore, join_stores, write_store
from fastsft.data.tokenise import tokenise
from fastsft.files import sync
from fastsft.models.tokenizer import Tokenizer

RECORDS = 1024  # per shard
_AHEAD = 2  # shards that wait for their turn to be written, per thread


def tokenise_to_store(
    path: Path,
    records: Sequence[Record],
    tokenizer: Tokenizer,
    config: Config,
    problems: Problems,
    tell: Callable[[int, int], None],
) -> SampleStore:
    """The store of the usable records in ``path``, begun or continued; ``tell`` gets (records done, all).

    Everything in ``path`` and beside it must be of these records, this tokenizer and this configuration.

    Raises:
        DataError: an unusable record, in mode "fail" of ``problems``.
    """
    parts = path.with_name(f"{path.name}.parts")
    if not (path / "manifest.json").is_file():
        found = Problems(problems.mode, problems.skip)
        infilled: Counter[str] = Counter()
        shards = []
        # Only the names are kept: an open store holds several mapped files, and a process may have few.
        for shard, manifest in _shards(parts, records, tokenizer, config, problems):
            shards.append(shard)
            found.merge(manifest["problems"])
            infilled.update(manifest["infilled"])
            tell(min(len(shards) * RECORDS, len(records)), len(records))
        join_stores(path, map(SampleStore.open, shards), problems=found.to_dict(), infilled=infilled)
    sync(path.parent)  # the store's name, which a killed run may have left unsynced, is on disk before the shards go
    shutil.rmtree(parts, ignore_errors=True)
    store = SampleStore.open(path)
    problems.merge(store.manifest["problems"])
    return store


def _shards(
    parts: Path, records: Sequence[Record], tokenizer: Tokenizer, config: Config, problems: Problems
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder and manifest of each shard's store in order: found if it is there, otherwise made and written."""

    def make(begin: int) -> tuple[list[Sample], dict[str, Any]]:
        found, infilled = Problems(problems.mode, problems.skip), Counter[str]()
        shard = records[begin : begin + RECORDS]
        samples = list(tokenise(shard, tokenizer, config, found, first=begin, infilled=infilled))
        return samples, {"problems": found.to_dict(), "infilled": infilled}

    threads = min(4, len(os.sched_getaffinity(0)))
    begins = range(0, len(records), RECORDS)
    waiting: deque[tuple[Path, Future[Any] | None]] = deque()
    pool = ThreadPoolExecutor(threads, "tokenise")
    try:
        ahead = iter(begins)
        while True:
            while len(waiting) < _AHEAD * threads and (begin := next(ahead, None)) is not None:
                shard = parts / f"{begin // RECORDS:08d}"
                waiting.append((shard, None if shard.is_dir() else pool.submit(make, begin)))
            if not waiting:
                return
            shard, future = waiting.popleft()
            if future is None:
                yield shard, SampleStore.open(shard).manifest
            else:
                samples, manifest = future.result()
                yield shard, write_store(shard, samples, **manifest).manifest
    finally:
        pool.shutdown(cancel_futures=True)
