"""A file of functions deduplicated into another: whole commands, from start to exit, against text-dedup and datatrove.

Every contestant is a process of its own that reads JSON lines and writes those kept, at equal parameters (word 5-grams,
128 hashes, threshold 0.7, one process, one thread); text-dedup and datatrove do not compare candidates exactly.
``FASTSFT_BENCH_RIVALS`` names the Python of an environment with text-dedup 0.4, datatrove 0.10, spacy and xxhash < 4,
which do not go together with what we use. datatrove gets a tenth of the rows.
``fastsft, imported`` is the call alone in a process that has imported everything and made it before, as in a pipeline.
The gate: of the pairs of texts with equal words, every contestant keeps one.
``extra_info``: documents, documents per second, CPU seconds, kept documents.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import corpus
import pytest
from rivals import python_with
from sizes import size

COUNT = int(size("DOCS", 100_000, quick=2000))

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
source, out = sys.argv[1:]
config = MinhashConfig(n_grams=5, num_buckets=16, hashes_per_bucket=8)
read = lambda: JsonlReader(source, text_key="text", id_key="id")
stages = [
    [read(), MinhashDedupSignature(f"{out}/signatures", config=config)],
    [MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=config)],
    [MinhashDedupCluster(f"{out}/buckets", f"{out}/remove", config=config)],
    [read(), MinhashDedupFilter(f"{out}/remove"), JsonlWriter(f"{out}/kept", compression=None)],
]
for stage, pipeline in enumerate(stages):
    LocalPipelineExecutor(pipeline, tasks=16 if stage == 1 else 1, workers=1, logging_dir=f"{out}/logs{stage}").run()
"""  # noqa: E501

IMPORTED = """
import sys
from pathlib import Path
from fastsft._C import keep_freed_memory
from fastsft.data.dedup_files import dedup_files
from fastsft.data.link import LinkOptions
from fastsft.data.problems import Problems
from fastsft.data.scan import SketchOptions
keep_freed_memory()
for _ in sys.stdin:
    dedup_files([Path(sys.argv[1])], Path(sys.argv[2]), Problems("fail"), sketch=SketchOptions(), how=LinkOptions())
    print(flush=True)
"""
GROUP = f"deduplication of a file of {COUNT} functions"


@functools.cache
def source(count: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fastsft-bench-")) / "rows"
    folder.mkdir()
    with open(folder / "rows.jsonl", "w") as stream:
        for i, text in enumerate(texts()[:count]):
            stream.write(json.dumps({"id": str(i), "text": text}) + "\n")
    return folder / "rows.jsonl"


@functools.cache
def texts() -> list[str]:
    return corpus.documents(COUNT)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "FASTSFT_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*command: str) -> str:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def with_fastsft(path: Path, out: Path) -> int:
    run(sys.executable, "-m", "fastsft", "dedup", str(path), "-o", str(out / "kept.jsonl"), "--json")
    return sum(1 for _ in open(out / "kept.jsonl"))


def with_text_dedup(path: Path, out: Path) -> int:
    python = python_with("text_dedup")
    run(python, "-m", "text_dedup.minhash", "--path", "json", "--data_files", str(path), "--split", "train",
        "--cache_dir", str(out / "cache"), "--output", str(out / "kept"), "--column", "text", "--ngram", "5",
        "--num_perm", "128", "--threshold", "0.7", "--b", "16", "--r", "8", "--min_length", "1", "--batch_size",
        "10000", "--num_proc", "1")  # fmt: skip
    code = "import sys, datasets; print(len(datasets.load_from_disk(sys.argv[1])))"
    return int(run(python, "-c", code, str(out / "kept")))


def with_datatrove(path: Path, out: Path) -> int:
    run(python_with("datatrove"), "-c", DATATROVE, str(path.parent), str(out))
    return sum(1 for p in (out / "kept").glob("*.jsonl") for _ in open(p))


CONTESTANTS = {"fastsft": with_fastsft, "text-dedup": with_text_dedup, "datatrove": with_datatrove}
MODULES = {"text-dedup": "text_dedup", "datatrove": "datatrove"}


def installed(contestant: str) -> bool:
    return contestant not in MODULES or python_with(MODULES[contestant]) is not None


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_file_to_file(benchmark, contestant, tmp_path):
    if not installed(contestant):
        pytest.skip("not installed")
    count = COUNT // 10 if contestant == "datatrove" else COUNT
    path = source(count)
    rounds = 5 if contestant == "fastsft" else 1
    kept = []

    def once() -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        kept.append(CONTESTANTS[contestant](path, tmp_path))

    benchmark.group = GROUP
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    benchmark.pedantic(once, rounds=rounds)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = len({" ".join(re.findall(r"\w+", text.lower())) for text in texts()[:count]})
    assert 0.5 * words < kept[0] <= words * 1.001
    seconds = benchmark.stats["median"]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    benchmark.extra_info |= {
        "documents": count, "documents_per_second": count / seconds, "cpu_seconds": cpu / rounds, "kept": kept[0],
    }  # fmt: skip


def test_call_alone(benchmark, tmp_path):
    command = [sys.executable, "-c", IMPORTED, str(source(COUNT)), str(tmp_path / "kept.jsonl")]
    benchmark.group, benchmark.name = GROUP, "fastsft, imported"
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def call() -> None:
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"\n"

        benchmark.pedantic(call, warmup_rounds=1, rounds=9)
        process.stdin.close()
    benchmark.extra_info |= {"documents": COUNT, "documents_per_second": COUNT / benchmark.stats["median"]}
