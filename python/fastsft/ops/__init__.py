"""The hot paths as functions of torch tensors (or of texts and arrays, for the data side).

The ops on tensors are imported, and registered with torch, on first use: the data side runs without torch.
``fastsft.ops.reference`` holds the same functions in plain torch and numpy: the specification and the tests' oracle.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastsft.ops.all_pairs import similar_pairs
from fastsft.ops.digest import text_digests
from fastsft.ops.duplicates import link_similar, near_duplicates
from fastsft.ops.fim_rows import fim_rows
from fastsft.ops.jsonl import jsonl_fields
from fastsft.ops.minhash import lsh_keys, minhash_signatures
from fastsft.ops.overlap import ngram_index, ngram_overlap
from fastsft.ops.pack import pack_sequences

if TYPE_CHECKING:
    from fastsft.ops.activation import swiglu
    from fastsft.ops.attention import attention_plan, varlen_attention
    from fastsft.ops.attention_paged import paged_attention
    from fastsft.ops.fim import fim_permute
    from fastsft.ops.gemm import linear
    from fastsft.ops.kv_cache import cached_attention, kv_write
    from fastsft.ops.loss import linear_cross_entropy, linear_logprobs
    from fastsft.ops.lsh import lsh_clusters
    from fastsft.ops.matvec import pack_weight, packed_linear
    from fastsft.ops.minhash_tokens import minhash_token_signatures
    from fastsft.ops.norm import rms_norm
    from fastsft.ops.rope import apply_rope
    from fastsft.ops.sampling import sample

__all__ = [
    "apply_rope",
    "attention_plan",
    "cached_attention",
    "fim_permute",
    "fim_rows",
    "jsonl_fields",
    "kv_write",
    "linear",
    "linear_cross_entropy",
    "linear_logprobs",
    "link_similar",
    "lsh_clusters",
    "lsh_keys",
    "minhash_signatures",
    "minhash_token_signatures",
    "near_duplicates",
    "ngram_index",
    "ngram_overlap",
    "pack_sequences",
    "pack_weight",
    "packed_linear",
    "paged_attention",
    "rms_norm",
    "sample",
    "similar_pairs",
    "swiglu",
    "text_digests",
    "varlen_attention",
]

# No module here may be called like the function that it gives: importing it would put it in the function's place.
_HOME = {
    "apply_rope": "rope",
    "attention_plan": "attention",
    "cached_attention": "kv_cache",
    "fim_permute": "fim",
    "kv_write": "kv_cache",
    "linear": "gemm",
    "linear_cross_entropy": "loss",
    "linear_logprobs": "loss",
    "lsh_clusters": "lsh",
    "minhash_token_signatures": "minhash_tokens",
    "pack_weight": "matvec",
    "packed_linear": "matvec",
    "paged_attention": "attention_paged",
    "rms_norm": "norm",
    "sample": "sampling",
    "swiglu": "activation",
    "varlen_attention": "attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastsft.ops' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastsft.ops.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
