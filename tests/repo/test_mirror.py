"""Every op has all its parts: header, CPU file, Python op, reference, test, bench, C++ test, docs row."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import fastsft.ops
from fastsft.ops import reference

ROOT = Path(__file__).resolve().parents[2]

# public function -> stem of its files
STEMS = {
    "attention_plan": "attention",
    "varlen_attention": "attention",
    "paged_attention": "attention",
    "kv_write": "kv_cache",
    "cached_attention": "kv_cache",
    "linear": "gemm",
    "pack_weight": "matvec",
    "packed_linear": "matvec",
    "linear_cross_entropy": "loss",
    "linear_logprobs": "loss",
    "fim_permute": "fim",
    "fim_rows": "fim_rows",
    "minhash_signatures": "minhash",
    "minhash_token_signatures": "minhash",
    "lsh_clusters": "minhash",
    "lsh_keys": "minhash",
    "link_similar": "duplicates",
    "near_duplicates": "duplicates",
    "similar_pairs": "all_pairs",
    "ngram_index": "overlap",
    "ngram_overlap": "overlap",
    "pack_sequences": "pack",
    "jsonl_fields": "jsonl",
    "text_digests": "digest",
    "sample": "sampling",
    "rms_norm": "norm",
    "apply_rope": "rope",
    "swiglu": "activation",
}


def test_every_public_op_is_listed() -> None:
    assert set(STEMS) == set(fastsft.ops.__all__)


@pytest.mark.parametrize("stem", sorted(set(STEMS.values())))
@pytest.mark.parametrize(
    "part",
    [
        "csrc/include/fastsft/{}.h",
        "csrc/cpu/{}.cpp",
        "python/fastsft/ops/{}.py",
        "tests/ops/test_{}.py",
        "tests/cpp/{}_test.cpp",
        "bench/bench_{}.py",
    ],
)
def test_parts_exist(stem: str, part: str) -> None:
    path = ROOT / part.format(stem)
    assert path.is_file(), f"op {stem!r} lacks {path.relative_to(ROOT)}; see docs/adding-an-op.md"


@pytest.mark.parametrize("name", sorted(STEMS))
def test_reference_docstring_and_docs_row(name: str) -> None:
    assert callable(getattr(reference, name)), f"ops/reference lacks {name}"
    doc = inspect.getdoc(getattr(fastsft.ops, name)) or ""
    assert "Args:" in doc, name
    assert "Raises:" in doc, name
    assert f"`{name}`" in (ROOT / "docs" / "ops.md").read_text(), f"docs/ops.md lacks a row for {name}"


def test_info_reports_an_implementation_for_every_op() -> None:
    ops = fastsft.info()["ops"]
    for name in STEMS:
        mine = [op for op in ops if op == name or op.startswith(f"{name}_")]
        assert mine, f"{name} is in no row of fastsft.info()['ops']: {sorted(ops)}"
        for op in mine:
            assert {"cpu", "cuda"} <= set(ops[op]), op
            for implementation in ops[op].values():
                assert implementation["kind"] in {"native", "triton", "torch", "none"}
                assert implementation["reason"]
