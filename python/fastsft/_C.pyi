"""
Native kernels of fastsft. Private: call fastsft.ops, which checks devices and registers autograd.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import typing
__all__: list[str] = ['BpeTexts', 'ByteBpe', 'Decoder', 'DecoderAdapter', 'FimRowOptions', 'FimRowsInt32', 'FimRowsInt64', 'NgramIndex', 'SuffixAutomaton', 'active_isa', 'advise_huge_pages', 'all_pairs_clusters', 'attention_plan', 'available_isas', 'cached_attention', 'code_spans', 'compiler', 'cuda_architectures', 'describe', 'fim_copy_int32', 'fim_copy_int64', 'fim_cuts', 'fim_plan', 'gemm', 'jsonl_count', 'jsonl_fields', 'keep_freed_memory', 'kv_block_bytes', 'kv_write', 'link_similar', 'loss_gradient', 'loss_stats', 'lsh_clusters', 'lsh_keys', 'lsh_shape', 'lsh_step', 'minhash_signatures', 'minhash_token_signatures', 'near_duplicates', 'ngram_overlap', 'num_threads', 'pack_best_fit', 'pack_weight', 'packed_bytes', 'packed_linear', 'paged_attention', 'paged_attention_scratch', 'penalise', 'rms_norm', 'rms_norm_backward', 'rope', 'sample', 'sample_few', 'set_isa', 'set_num_threads', 'similar_pairs', 'swiglu', 'swiglu_backward', 'text_digests', 'unpack_weight', 'varlen_attention_bwd', 'varlen_attention_fwd']
class DecoderAdapter:
    pass
class Decoder:
    def __init__(self, embedding: typing.Any, norm: typing.Any, head: typing.Any, heads: typing.SupportsInt | typing.SupportsIndex, kv_heads: typing.SupportsInt | typing.SupportsIndex, head_dim: typing.SupportsInt | typing.SupportsIndex, intermediate: typing.SupportsInt | typing.SupportsIndex, eps: typing.SupportsFloat | typing.SupportsIndex) -> None:
        ...
    def adapter(self, layers: list) -> DecoderAdapter:
        ...
    def add_layer(self, layer: typing.Any) -> None:
        ...
    def kv_block_bytes(self, kv_format: str, block_size: typing.SupportsInt | typing.SupportsIndex) -> int:
        ...
    def step(self, ids: typing.Any, cos: typing.Any, sin: typing.Any, kv_format: str, cache: typing.Any, block_size: typing.SupportsInt | typing.SupportsIndex, cu_seqlens: typing.Any, context_lens: typing.Any, block_table: typing.Any, adapters: list, wanted: typing.Any, logits: typing.Any, hidden: typing.Any) -> None:
        ...
class ByteBpe:
    """
    A byte-level BPE vocabulary; see bpe.h.
    """
    def __init__(self, token_bytes: collections.abc.Sequence[bytes], merges: typing.Any, classes: typing.Any, gpt4: bool, max_digits: typing.SupportsInt | typing.SupportsIndex, digits_apart: bool, ignore_merges: bool) -> None:
        ...
class BpeTexts:
    """
    The ids of many texts; see bpe_texts.h.
    """
    def __init__(self, encoder: ByteBpe, texts: typing.Any) -> None:
        ...
    def write(self, ids: typing.Any, cu_seqlens: typing.Any, exact: typing.Any) -> None:
        ...
    @property
    def num_tokens(self) -> int:
        ...
    @property
    def unknown(self) -> list[int]:
        ...
class FimRowOptions:
    def __init__(self, seed: typing.SupportsInt | typing.SupportsIndex, rate: typing.SupportsFloat | typing.SupportsIndex, spm_rate: typing.SupportsFloat | typing.SupportsIndex, max_len: typing.SupportsInt | typing.SupportsIndex, unit: typing.SupportsInt | typing.SupportsIndex, train_context: bool, plain: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], psm: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], spm: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        ...
class FimRowsInt32:
    """
    The first pass of fim_rows: what becomes of each document.
    """
    def __init__(self, tokens: typing.Any, cu_seqlens: typing.Any, doc_ids: typing.Any, spans: typing.Any, options: FimRowOptions, encoder: typing.Any) -> None:
        ...
    def write(self, tokens: typing.Any, targets: typing.Any, position_ids: typing.Any, middle_left: typing.Any, mode: typing.Any, cuts: typing.Any, bounds: typing.Any) -> None:
        """
        The second pass.
        """
    @property
    def cu_seqlens(self) -> list[int]:
        ...
    @property
    def num_tokens(self) -> int:
        ...
    @property
    def unknown(self) -> list[int]:
        ...
class FimRowsInt64:
    """
    The first pass of fim_rows: what becomes of each document.
    """
    def __init__(self, tokens: typing.Any, cu_seqlens: typing.Any, doc_ids: typing.Any, spans: typing.Any, options: FimRowOptions, encoder: typing.Any) -> None:
        ...
    def write(self, tokens: typing.Any, targets: typing.Any, position_ids: typing.Any, middle_left: typing.Any, mode: typing.Any, cuts: typing.Any, bounds: typing.Any) -> None:
        """
        The second pass.
        """
    @property
    def cu_seqlens(self) -> list[int]:
        ...
    @property
    def num_tokens(self) -> int:
        ...
    @property
    def unknown(self) -> list[int]:
        ...
class NgramIndex:
    """
    Every n-gram of some references, for each n.
    """
    def __init__(self, references: typing.Any, offsets: typing.Any, ngrams: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        ...
    def __len__(self) -> int:
        ...
    @property
    def ngrams(self) -> list[int]:
        ...
    @property
    def num_words(self) -> numpy.typing.NDArray[numpy.int64]:
        ...
class SuffixAutomaton:
    """
    See suffix_automaton.h.
    """
    def __init__(self) -> None:
        ...
    def extend(self, tokens: typing.Any) -> None:
        ...
    def follow(self, state: typing.SupportsInt | typing.SupportsIndex, length: typing.SupportsInt | typing.SupportsIndex, tokens: typing.Any) -> tuple:
        ...
    def propose(self, out: typing.Any) -> int:
        ...
    def propose_at(self, state: typing.SupportsInt | typing.SupportsIndex, length: typing.SupportsInt | typing.SupportsIndex, out: typing.Any) -> int:
        ...
    @property
    def bytes(self) -> int:
        ...
    @property
    def repeated(self) -> int:
        ...
    @property
    def size(self) -> int:
        ...
    @property
    def states(self) -> int:
        ...
def active_isa() -> str:
    ...
def advise_huge_pages(tensor: typing.Any) -> None:
    """
    Ask for huge pages under a fresh CPU tensor, before it is first written.
    """
def all_pairs_clusters(texts: typing.Any, offsets: typing.Any, ngram: typing.SupportsInt | typing.SupportsIndex, chars: bool, threshold: typing.SupportsFloat | typing.SupportsIndex, max_cluster: typing.SupportsInt | typing.SupportsIndex, labels: typing.Any) -> None:
    """
    Fills labels, int64 [N]; max_cluster 0 is no limit.
    """
def attention_plan(cu_seqlens_q: typing.Any, cu_seqlens_k: typing.Any, total_q: typing.SupportsInt | typing.SupportsIndex, total_k: typing.SupportsInt | typing.SupportsIndex, causal: bool, window_left: typing.SupportsInt | typing.SupportsIndex, window_right: typing.SupportsInt | typing.SupportsIndex, plan: typing.Any) -> None:
    ...
def available_isas() -> list[str]:
    ...
def cached_attention(q: typing.Any, blocks: typing.Any, format: str, heads: typing.SupportsInt | typing.SupportsIndex, block_size: typing.SupportsInt | typing.SupportsIndex, block_table: typing.Any, cu_seqlens: typing.Any, context_lens: typing.Any, window_left: typing.SupportsInt | typing.SupportsIndex, scale: typing.SupportsFloat | typing.SupportsIndex, out: typing.Any) -> None:
    ...
def code_spans(text: bytes) -> list[tuple[int, int]]:
    """
    Statements, blocks and brackets of Python source, as bytes [begin, end).
    """
def compiler() -> str:
    ...
def cuda_architectures() -> str:
    """
    Architectures compiled in, or '' for a CPU-only build.
    """
def describe(tensor: typing.Any) -> str:
    """
    How the bindings see a tensor: dtype, shape, device.
    """
def fim_copy_int32(tokens: typing.Any, cu_seqlens: typing.Any, mode: typing.Any, cuts: typing.Any, out_cu_seqlens: typing.Any, sentinels: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(3)"], out_tokens: typing.Any, source_index: typing.Any) -> None:
    """
    Second pass, after fim_plan.
    """
def fim_copy_int64(tokens: typing.Any, cu_seqlens: typing.Any, mode: typing.Any, cuts: typing.Any, out_cu_seqlens: typing.Any, sentinels: typing.Annotated[collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], "FixedSize(3)"], out_tokens: typing.Any, source_index: typing.Any) -> None:
    """
    Second pass, after fim_plan.
    """
def fim_cuts(texts: collections.abc.Sequence[bytes], doc_ids: typing.Any, options: FimRowOptions, mode: typing.Any, cuts: typing.Any) -> None:
    """
    Draws the mode and the middle, in bytes, of UTF-8 texts.
    """
def fim_plan(cu_seqlens: typing.Any, num_tokens: typing.SupportsInt | typing.SupportsIndex, doc_ids: typing.Any, spans: typing.Any, seed: typing.SupportsInt | typing.SupportsIndex, rate: typing.SupportsFloat | typing.SupportsIndex, spm_rate: typing.SupportsFloat | typing.SupportsIndex, max_len: typing.SupportsInt | typing.SupportsIndex, mode: typing.Any, cuts: typing.Any, out_cu_seqlens: typing.Any, broken: typing.Any = None) -> int:
    """
    Decides modes and cuts; returns the number of output tokens. On CUDA: writes lengths to out_cu_seqlens[1:], sets broken where it would raise, returns 0.
    """
def gemm(a: typing.Any, b: typing.Any, c: typing.Any, accumulate: bool) -> None:
    ...
def jsonl_count(data: typing.Any) -> int:
    """
    Number of lines.
    """
def jsonl_fields(data: typing.Any, wanted: collections.abc.Sequence[str], unwanted: collections.abc.Sequence[str], separator: str, lines: typing.Any, status: typing.Any, text: typing.Any, offsets: typing.Any) -> int:
    """
    Fills lines [N+1], status [N], text and offsets [N*F+1]; returns the bytes of text in use.
    """
def keep_freed_memory() -> bool:
    """
    Let the C library keep what is freed; for whole programs.
    """
def kv_block_bytes(format: str, heads: typing.SupportsInt | typing.SupportsIndex, head_dim: typing.SupportsInt | typing.SupportsIndex, block_size: typing.SupportsInt | typing.SupportsIndex) -> int:
    ...
def kv_write(blocks: typing.Any, format: str, block_size: typing.SupportsInt | typing.SupportsIndex, k: typing.Any, v: typing.Any, block_table: typing.Any, cu_seqlens: typing.Any, context_lens: typing.Any) -> None:
    ...
def link_similar(texts: typing.Any, offsets: typing.Any, members: typing.Any, bucket_offsets: typing.Any, rows: typing.Any, parent: typing.Any, threshold: typing.SupportsFloat | typing.SupportsIndex, ngram: typing.SupportsInt | typing.SupportsIndex, chars: bool, max_cluster: typing.SupportsInt | typing.SupportsIndex) -> None:
    """
    Joins rows of parent, int64 [R]; max_cluster 0 is no limit.
    """
def loss_gradient(logits: typing.Any, targets: typing.Any, bias: typing.Any, reference: typing.Any, softcap: typing.SupportsFloat | typing.SupportsIndex, temperature: typing.SupportsFloat | typing.SupportsIndex, stats: typing.Any, coefficients: typing.Any) -> None:
    ...
def loss_stats(logits: typing.Any, targets: typing.Any, bias: typing.Any, reference: typing.Any, softcap: typing.SupportsFloat | typing.SupportsIndex, temperature: typing.SupportsFloat | typing.SupportsIndex, forward_divergence: bool, stats: typing.Any) -> None:
    ...
def lsh_clusters(signatures: typing.Any, threshold: typing.SupportsFloat | typing.SupportsIndex, bands: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, labels: typing.Any) -> None:
    """
    Fills labels, int64 [N].
    """
def lsh_keys(signatures: typing.Any, rows: typing.SupportsInt | typing.SupportsIndex, keys: typing.Any) -> None:
    """
    Fills keys, int64 [bands, N].
    """
def lsh_shape(num_perm: typing.SupportsInt | typing.SupportsIndex, threshold: typing.SupportsFloat | typing.SupportsIndex) -> tuple[int, int]:
    """
    (bands, rows) with the least weighted error.
    """
def lsh_step(step: str, signatures: typing.Any, parent: typing.Any, duplicate: typing.Any, keys: typing.Any, order: typing.Any, labels: typing.Any, first: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex, threshold: typing.SupportsFloat | typing.SupportsIndex) -> None:
    """
    A step of lsh_clusters on CUDA: keys, duplicates, neighbours, groups or labels.
    """
def minhash_signatures(texts: typing.Any, offsets: typing.Any, num_perm: typing.SupportsInt | typing.SupportsIndex, ngram: typing.SupportsInt | typing.SupportsIndex, chars: bool, seed: typing.SupportsInt | typing.SupportsIndex, signatures: typing.Any) -> None:
    """
    Fills signatures, uint32 [N, num_perm].
    """
def minhash_token_signatures(tokens: typing.Any, cu_seqlens: typing.Any, ngram: typing.SupportsInt | typing.SupportsIndex, seed: typing.SupportsInt | typing.SupportsIndex, signatures: typing.Any) -> None:
    """
    Fills signatures, uint32 [N, num_perm].
    """
def near_duplicates(texts: typing.Any, offsets: typing.Any, num_perm: typing.SupportsInt | typing.SupportsIndex, ngram: typing.SupportsInt | typing.SupportsIndex, chars: bool, seed: typing.SupportsInt | typing.SupportsIndex, bands: typing.SupportsInt | typing.SupportsIndex, rows: typing.SupportsInt | typing.SupportsIndex, threshold: typing.SupportsFloat | typing.SupportsIndex, verify: bool, max_cluster: typing.SupportsInt | typing.SupportsIndex, labels: typing.Any) -> None:
    """
    Fills labels, int64 [N]; max_cluster 0 is no limit.
    """
def ngram_overlap(texts: typing.Any, offsets: typing.Any, index: NgramIndex, above: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex] | None) -> tuple:
    """
    (pairs int64 [M, 2], shared int64 [M, K, 4]: n-grams, words, begin, end; found uint8 [R])
    """
def num_threads() -> int:
    ...
def pack_best_fit(lengths: typing.Any, capacity: typing.SupportsInt | typing.SupportsIndex, order: typing.Any, offsets: typing.Any) -> int:
    """
    Fills order and offsets; returns the number of bins.
    """
def pack_weight(parts: list, format: str, group: typing.SupportsInt | typing.SupportsIndex, n: typing.SupportsInt | typing.SupportsIndex, k: typing.SupportsInt | typing.SupportsIndex, data: typing.Any, scales: typing.Any) -> None:
    ...
def packed_bytes(format: str, n: typing.SupportsInt | typing.SupportsIndex, k: typing.SupportsInt | typing.SupportsIndex) -> int:
    ...
def packed_linear(x: typing.Any, format: str, group: typing.SupportsInt | typing.SupportsIndex, data: typing.Any, scales: typing.Any, bias: typing.Any, out: typing.Any) -> None:
    ...
def paged_attention(q: typing.Any, k_cache: typing.Any, v_cache: typing.Any, block_table: typing.Any, cu_seqlens_q: typing.Any, context_lens: typing.Any, causal: bool, scale: typing.SupportsFloat | typing.SupportsIndex, window_left: typing.SupportsInt | typing.SupportsIndex, window_right: typing.SupportsInt | typing.SupportsIndex, softcap: typing.SupportsFloat | typing.SupportsIndex, scratch: typing.Any, out: typing.Any) -> None:
    ...
def paged_attention_scratch(query_rows: typing.SupportsInt | typing.SupportsIndex, head_dim: typing.SupportsInt | typing.SupportsIndex, max_keys: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Floats that paged_attention needs on CUDA.
    """
def penalise(logits: typing.Any, tokens: typing.Any, prompt: typing.SupportsInt | typing.SupportsIndex, first: typing.SupportsInt | typing.SupportsIndex, repetition: typing.SupportsFloat | typing.SupportsIndex, frequency: typing.SupportsFloat | typing.SupportsIndex, presence: typing.SupportsFloat | typing.SupportsIndex) -> None:
    """
    Changes logits.
    """
def rms_norm(x: typing.Any, weight: typing.Any, eps: typing.SupportsFloat | typing.SupportsIndex, out: typing.Any, scale: typing.Any) -> None:
    ...
def rms_norm_backward(x: typing.Any, weight: typing.Any, scale: typing.Any, grad: typing.Any, d_x: typing.Any, d_weight: typing.Any) -> None:
    ...
def rope(x: typing.Any, cos: typing.Any, sin: typing.Any, inverse: bool, out: typing.Any) -> None:
    ...
def sample(logits: typing.Any, temperature: typing.Any, top_k: typing.Any, top_p: typing.Any, min_p: typing.Any, seeds: typing.Any, positions: typing.Any, ids: typing.Any, logprobs: typing.Any) -> None:
    """
    Fills ids and logprobs.
    """
def sample_few(logits: typing.Any, rows: collections.abc.Sequence[tuple[typing.SupportsFloat | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsFloat | typing.SupportsIndex, typing.SupportsFloat | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]]) -> tuple[list[int], list[float]]:
    """
    ids and logprobs.
    """
def set_isa(name: str) -> None:
    ...
def set_num_threads(n: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
def similar_pairs(texts: typing.Any, offsets: typing.Any, threshold: typing.SupportsFloat | typing.SupportsIndex, ngram: typing.SupportsInt | typing.SupportsIndex, chars: bool) -> tuple:
    """
    (int64 [P, 2], float64 [P])
    """
def swiglu(gate: typing.Any, up: typing.Any, out: typing.Any) -> None:
    ...
def swiglu_backward(gate: typing.Any, up: typing.Any, grad: typing.Any, d_gate: typing.Any, d_up: typing.Any) -> None:
    ...
def text_digests(texts: typing.Any, offsets: typing.Any, digests: typing.Any) -> None:
    """
    Fills digests, uint64 [N, 2].
    """
def unpack_weight(format: str, data: typing.Any, values: typing.Any) -> None:
    ...
def varlen_attention_bwd(dout: typing.Any, q: typing.Any, k: typing.Any, v: typing.Any, out: typing.Any, lse: typing.Any, dlse: typing.Any, cu_seqlens_q: typing.Any, cu_seqlens_k: typing.Any, plan: typing.Any, causal: bool, scale: typing.SupportsFloat | typing.SupportsIndex, window_left: typing.SupportsInt | typing.SupportsIndex, window_right: typing.SupportsInt | typing.SupportsIndex, softcap: typing.SupportsFloat | typing.SupportsIndex, delta: typing.Any, dq: typing.Any, dk: typing.Any, dv: typing.Any) -> None:
    ...
def varlen_attention_fwd(q: typing.Any, k: typing.Any, v: typing.Any, cu_seqlens_q: typing.Any, cu_seqlens_k: typing.Any, plan: typing.Any, causal: bool, scale: typing.SupportsFloat | typing.SupportsIndex, window_left: typing.SupportsInt | typing.SupportsIndex, window_right: typing.SupportsInt | typing.SupportsIndex, softcap: typing.SupportsFloat | typing.SupportsIndex, out: typing.Any, lse: typing.Any) -> None:
    ...
