"""``fastsft dedup`` on a file that is larger than the memory it may use, and killed on the way.

``FASTSFT_BENCH_GB`` is the size of the file (the disk needs three times as much), 0.2 by default; the limit is 1 GiB
for 5 GB, and at least 128 MiB. The rows are random words; a known part of them stands twice, as it is or with some
words replaced. The gates: exact copies are all found, near ones nearly all, nothing else is; the process stays within
its limit; a second run, killed with SIGKILL at four random instants, gives the same bytes.
``extra_info``: documents, kept, megabytes per second, the peak of the process tree, the kills, and the seconds that the
run after the last of them took.
"""

from __future__ import annotations

import filecmp
import json
import os
import random
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from sizes import size

SIZE = int(size("GB", 0.2, quick=0.02) * 1e9)
LIMIT_MIB = max(128, round(1024 * SIZE / 5e9))
KILLS = 4
BASES = 20_000  # rows that later ones repeat: further apart than the memory reaches
WORDS = 1 << 16


class Corpus(NamedTuple):
    rows: int
    exact: int  # of these, copies of an earlier row
    near: int  # and copies with one word in two hundred replaced, or one


def documents(seed: int = 0) -> Iterator[tuple[str, list[str]]]:
    """("new", "exact" or "near", the words of a row), for ever: 200 words by the median, as common as in a language."""
    rng = np.random.default_rng(seed)
    letters = rng.choice(list(string.ascii_lowercase), (WORDS, 12))
    lengths = rng.integers(3, 12, WORDS)
    vocabulary = np.array(["".join(row[:n]) for row, n in zip(letters, lengths, strict=True)], dtype=object)
    bases: list[np.ndarray] = []
    while True:
        for length in np.minimum(rng.lognormal(np.log(200), 0.8, 1024), 5000).astype(int) + 60:
            kind = "new"
            if len(bases) == BASES and rng.random() < 0.25:
                words = bases[int(rng.integers(BASES))]
                kind = "exact" if rng.random() < 0.3 else "near"
                if kind == "near":
                    words = words.copy()
                    words[rng.integers(len(words), size=len(words) // 200 + 1)] = rng.integers(WORDS)
            else:
                words = (float(WORDS) ** rng.random(length)).astype(np.int64)  # Zipf's law
                if len(bases) < BASES:
                    bases.append(words)
            yield kind, vocabulary[words].tolist()


def write_corpus(path: Path, size: int) -> Corpus:
    counts = {"new": 0, "exact": 0, "near": 0}
    written = 0
    with open(path, "w") as stream:
        for kind, words in documents():
            written += stream.write(f'{{"id": {sum(counts.values())}, "text": "{" ".join(words)}"}}\n')
            counts[kind] += 1
            if written >= size:
                return Corpus(sum(counts.values()), counts["exact"], counts["near"])
    raise AssertionError("documents() ended")


def start(source: Path, out: Path, work: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fastsft", "dedup", str(source), "-o", str(out), "--memory", f"{LIMIT_MIB}MiB"]
    command += ["--work", str(work), "--report", str(work.with_suffix(".json"))]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def resident(pid: int) -> int:
    """Bytes in memory of a process and all below it."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident(int(child)) for child in children)


def finish(process: subprocess.Popen[bytes]) -> int:
    """The most that it had in memory."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0
    return peak


@pytest.mark.timeout(7200)
def test_more_than_memory(benchmark, tmp_path):
    source, whole, pieces = (tmp_path / name for name in ("rows.jsonl", "whole.jsonl", "pieces.jsonl"))
    corpus = write_corpus(source, SIZE)
    benchmark.group = f"deduplication of a file of {SIZE / 1e9:g} GB within {LIMIT_MIB} MiB, and after {KILLS} kills"
    benchmark.name = "fastsft"
    work = tmp_path / "work"
    peak = benchmark.pedantic(lambda: finish(start(source, whole, work)), rounds=1)
    summary = json.loads(work.with_suffix(".json").read_text())
    seconds = benchmark.stats["median"]
    assert summary["exact_duplicates"] >= corpus.exact
    removed = summary["records"] - summary["kept"]
    assert summary["records"] == corpus.rows
    assert 0.97 * (corpus.exact + corpus.near) <= removed <= corpus.exact + corpus.near
    assert peak <= LIMIT_MIB << 20

    rng = random.Random(0)
    for _ in range(KILLS):
        process = start(source, pieces, work)
        time.sleep(rng.uniform(0.02, 0.24) * seconds)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not pieces.exists()
    begin = time.perf_counter()
    finish(start(source, pieces, work))
    rest = time.perf_counter() - begin
    assert filecmp.cmp(whole, pieces, shallow=False)
    for path in (source, whole, pieces):
        path.unlink()  # pytest keeps its folders
    benchmark.extra_info |= {
        "documents": corpus.rows, "kept": summary["kept"], "megabytes_per_second": SIZE / 1e6 / seconds,
        "peak_mib": peak / 2**20, "kills": KILLS, "seconds_after_the_last": rest,
    }  # fmt: skip
