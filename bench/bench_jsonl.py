"""One text field of JSON Lines: the native scanner against the full parsers that readers use.

The rows are the functions of bench_minhash.py's corpus with an id. The gate: every contestant finds the same texts.
``extra_info`` holds GB of lines per second; run pinned to one core to compare with single-threaded parsers.
"""

from __future__ import annotations

import functools
import io
import itertools
import json

import numpy as np
import orjson
import pytest
from bench_minhash import corpus

from fastsft import ops


@functools.cache
def lines() -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(corpus())).encode()


def with_fastsft(data: bytes):
    return ops.jsonl_fields(data, ["text"], out=_room(len(data)))


@functools.cache
def _room(size: int) -> np.ndarray:
    return np.empty(size, np.uint8)


def with_orjson(data: bytes) -> list[str]:
    return [orjson.loads(line)["text"] for line in data.splitlines()]


def with_json(data: bytes) -> list[str]:
    return [json.loads(line)["text"] for line in data.splitlines()]


def with_pyarrow(data: bytes):
    from pyarrow import json as reader

    options = reader.ReadOptions(use_threads=False, block_size=1 << 24)
    return reader.read_json(io.BytesIO(data), read_options=options)["text"]


def texts(found) -> list[str]:
    if isinstance(found, list):
        return found
    if isinstance(found, ops.jsonl.JsonlFields):
        text, offsets = found.text.tobytes(), found.offsets.tolist()
        return [text[a:b].decode() for a, b in itertools.pairwise(offsets)]
    return found.to_pylist()


CONTESTANTS = {"fastsft": with_fastsft, "orjson": with_orjson, "json": with_json, "pyarrow": with_pyarrow}


@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_jsonl(benchmark, contestant):
    data = lines()
    sample = data[: data.index(b"\n", 1_000_000) + 1]
    assert texts(CONTESTANTS[contestant](sample)) == with_json(sample)
    benchmark.group = "one text field of JSON Lines"
    benchmark(CONTESTANTS[contestant], data)
    benchmark.extra_info["GB_per_second"] = len(data) / 1e9 / benchmark.stats["median"]
