"""The hot paths as functions of torch tensors (or of texts and arrays, for the data side).

``fastsft.ops.reference`` holds the same functions in plain torch and numpy: the specification and the tests' oracle.
"""

from fastsft.ops.activation import swiglu
from fastsft.ops.all_pairs import similar_pairs
from fastsft.ops.attention import attention_plan, varlen_attention
from fastsft.ops.digest import text_digests
from fastsft.ops.duplicates import link_similar, near_duplicates
from fastsft.ops.fim import fim_permute
from fastsft.ops.fim_rows import fim_rows
from fastsft.ops.gemm import linear
from fastsft.ops.jsonl import jsonl_fields
from fastsft.ops.loss import linear_cross_entropy, linear_logprobs
from fastsft.ops.matvec import pack_weight, packed_linear
from fastsft.ops.minhash import lsh_clusters, lsh_keys, minhash_signatures, minhash_token_signatures
from fastsft.ops.norm import rms_norm
from fastsft.ops.overlap import ngram_index, ngram_overlap
from fastsft.ops.pack import pack_sequences
from fastsft.ops.paged_attention import paged_attention
from fastsft.ops.rope import apply_rope
from fastsft.ops.sampling import sample

__all__ = [
    "apply_rope",
    "attention_plan",
    "fim_permute",
    "fim_rows",
    "jsonl_fields",
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
