"""The specification of every op in plain torch and numpy: obvious, slow, differentiable by autograd.

The tests hold the kernels against these functions in float64; the benches use them as one baseline.
"""

from fastsft.ops.reference.attention import (
    attention_one,
    attention_plan,
    paged_attention,
    varlen_attention,
    visible,
)
from fastsft.ops.reference.digest import text_digests
from fastsft.ops.reference.duplicates import link_similar, near_duplicates, similar_pairs
from fastsft.ops.reference.fim import fim_permute, fim_rows
from fastsft.ops.reference.jsonl import jsonl_fields
from fastsft.ops.reference.kv_cache import cached_attention, kv_places, kv_read, kv_write
from fastsft.ops.reference.layers import (
    apply_rope,
    linear,
    pack_weight,
    packed_linear,
    rms_norm,
    round_to_int8,
    swiglu,
)
from fastsft.ops.reference.loss import linear_cross_entropy, linear_logprobs, loss_gradient, loss_stats
from fastsft.ops.reference.minhash import (
    fmix32,
    lsh_clusters,
    lsh_keys,
    lsh_shape,
    minhash_signatures,
    minhash_token_signatures,
    shingles,
    text_units,
    unit_hash,
)
from fastsft.ops.reference.objectives import objective_loss
from fastsft.ops.reference.overlap import ngram_index, ngram_overlap
from fastsft.ops.reference.pack import pack_sequences
from fastsft.ops.reference.rng import philox
from fastsft.ops.reference.sampling import gumbel_noise, kept_tokens, sample

__all__ = [
    "apply_rope",
    "attention_one",
    "attention_plan",
    "cached_attention",
    "fim_permute",
    "fim_rows",
    "fmix32",
    "gumbel_noise",
    "jsonl_fields",
    "kept_tokens",
    "kv_places",
    "kv_read",
    "kv_write",
    "linear",
    "linear_cross_entropy",
    "linear_logprobs",
    "link_similar",
    "loss_gradient",
    "loss_stats",
    "lsh_clusters",
    "lsh_keys",
    "lsh_shape",
    "minhash_signatures",
    "minhash_token_signatures",
    "near_duplicates",
    "ngram_index",
    "ngram_overlap",
    "objective_loss",
    "pack_sequences",
    "pack_weight",
    "packed_linear",
    "paged_attention",
    "philox",
    "rms_norm",
    "round_to_int8",
    "sample",
    "shingles",
    "similar_pairs",
    "swiglu",
    "text_digests",
    "text_units",
    "unit_hash",
    "varlen_attention",
    "visible",
]
