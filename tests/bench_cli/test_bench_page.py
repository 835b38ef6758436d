"""docs/benchmarks.md and the README's table are what the newest results give; the page shows what is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bench_cases import result, row

from fastsft.bench.page import HEADLINES, between, headlines, page
from fastsft.bench.topics import suite

ROOT = Path(__file__).parents[2]


def test_texts_are_what_the_results_give() -> None:
    done = subprocess.run([sys.executable, "bench/record.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_page() -> None:
    found = result(
        row("lost | here", times_ours=1.0, commit="abc1234", extra={"share_of_copy": 0.5, "fill": 0.9}),
        row("lost | here", "trl", 0.5, times_ours=0.5, p20=None, p80=None),
        row("won", bench="fim", times_ours=1.0, rounds=1),
        row("won", "numpy", 3.0, bench="fim", times_ours=3.0),
    )
    pages = {"big": "benchmarks.md", "toy": "benchmarks-toy.md"}
    text = page(found, "bench/results/toy/2026-01-02.json", suite(), pages)
    assert text.startswith("# Benchmarks on toy\n\ntoy: ")
    assert "Other machines: [big](benchmarks.md)." in text
    assert "| [fim](#fim) | fill-in-the-middle | 1 | 0 |" in text
    assert "| [pack](#pack) | packing of sequences | 1 | **1** |" in text
    assert (
        text.index("## Where a rival is faster")
        < text.index("| lost \\| here | trl | **0.50** |")
        < text.index("## fim")
    )
    assert "| lost \\| here | fastsft | 1 s | 990 ms to 1.01 s | 1.00 | 50% copy | fill 0.9 |" in text
    assert "|  | trl | 500 ms | ± 5 ms | **0.50** |  |  |" in text
    assert "| won | fastsft | 1 s | one round | 1.00 |  |  |" in text
    assert "(../bench/results/toy/2026-01-02.json)" in text
    assert "Measured 2026-01-02 at `abc1234` and before. ([How](../bench/bench_pack.py).)" in text


def test_headlines_take_the_fastest_rival() -> None:
    rows = []
    for _, group in HEADLINES:
        rows += [
            row(group, times_ours=1.0, extra={"documents_per_second": 10.0}),
            row(group, "slow", 2.0, times_ours=2.0),
            row(group, "fast", 0.1, times_ours=0.5),  # of a fifth of the work
            row(group, "fastsft, else", 0.1, times_ours=0.1),
        ]
    text = headlines(result(*rows))
    assert text.count("| 1 s | fast | 500 ms | **0.50** |") == len(HEADLINES)
    assert f"Bold: the rival is faster, as in {len(HEADLINES)} of {len(HEADLINES)} groups" in text
    with pytest.raises(ValueError, match="which was not measured against a rival"):
        headlines(result(*rows[:3]))


def test_between_the_markers() -> None:
    assert between("a\n<!-- x -->\nold\n<!-- /x -->\nb", "x", "new") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    with pytest.raises(ValueError, match="expected the markers"):
        between("a", "x", "new")
