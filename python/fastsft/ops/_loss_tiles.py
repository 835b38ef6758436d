"""The op behind linear_cross_entropy and linear_logprobs: tiles of rows through matrix products and row kernels.

Rows with weight 0 are left out before the first product. The others go through in tiles: one product makes a tile's
logits, ``loss_stats`` reduces each row to a few numbers, the objective turns those into the row's loss and weight,
``loss_gradient`` replaces the logits by their gradient, and two more products give the gradients of hidden and weight.
A tile is all that ever exists of the logits. Tiles are visited from the last to the first, so that an objective that
looks at the rest of a sequence finds it known. One that looks at all of it needs every sequence within one tile; where
a sequence is longer than a tile, the logits are formed twice.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsft import _C
from fastsft.ops import objectives
from fastsft.ops._library import Implementation, define, record
from fastsft.ops.gemm import product

HIDDEN, WEIGHT, BIAS = 1, 2, 4  # bits of `grads`: which gradients to form

# Of logits. The fewer tiles, the fewer times the whole gradient of the weight is read and written; with a single one
# it needs no float32 buffer.
_TILE_BYTES = 256 << 20

_Range = tuple[int, int]  # of rows: begin, end


class Inputs(NamedTuple):
    """The op's tensors; per token: [T]. ``grad_weights`` are ``token_weights`` times what scales the gradient."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    token_weights: Tensor
    grad_weights: Tensor
    entropy_grads: Tensor | None = None  # gradient with respect to each row's entropy
    ref_logprobs: Tensor | None = None
    cu_seqlens: Tensor | None = None
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    accumulate_into: Tensor | None = None  # float32 [V, H], takes the gradient of weight


class Options(NamedTuple):
    objective: str = "nll"
    arguments: Any = ()  # numbers, as objectives.numbers orders them
    softcap: float = 0.0
    temperature: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0


_PER_TOKEN = ("hidden", "targets", "token_weights", "grad_weights", "entropy_grads", "ref_logprobs", "ref_hidden")


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 gradients stay in float32 until the upstream gradient, which holds the loss scale, is known."""
    return torch.float32 if dtype == torch.float16 else dtype


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    every, options, grads = Inputs(*arguments[:12]), Options(*arguments[12:18]), arguments[18]
    kept = every.token_weights.nonzero()[:, 0]
    total, count = every.targets.numel(), kept.numel()
    rows = every
    if count < total:
        given = {name: getattr(every, name) for name in _PER_TOKEN if getattr(every, name) is not None}
        rows = every._replace(**{name: tensor.index_select(0, kept) for name, tensor in given.items()})

    sweep = _Sweep(rows, options, kept)
    gradients = _Gradients(rows, grads, single=len(sweep.ranges) == 1)
    if sweep.look_ahead:
        for begin, end in sweep.ranges:
            sweep.reduce(begin, end)
        sweep.judge(0, count)
    for begin, end in sweep.ranges:
        sweep.reduce(begin, end)
        if not sweep.look_ahead:
            sweep.judge(begin, end)
        if grads:
            gradients.add(sweep.differentiate(begin, end), begin, end)

    per_token = [sweep.loss, sweep.stats[0], sweep.stats[1], rows.token_weights * sweep.weights]
    d_hidden, d_weight, d_bias = gradients.result()
    if grads & HIDDEN:
        per_token.append(d_hidden)
    if count < total:
        per_token = [t.new_zeros(total, *t.shape[1:]).index_copy_(0, kept, t) for t in per_token]
    return (*per_token[:4], per_token[4] if grads & HIDDEN else d_hidden, d_weight, d_bias)


class _Sweep:
    """The rows kept, what is known of each, and the tile at hand. ``kept``: their numbers among all tokens."""

    def __init__(self, rows: Inputs, options: Options, kept: Tensor) -> None:
        count, self.vocab = kept.numel(), rows.weight.shape[0]
        self.rows, self.options = rows, options
        self.arguments = objectives.named(options.objective, options.arguments)
        self.sequences = None if rows.cu_seqlens is None else objectives.Sequences(kept, rows.cu_seqlens)
        # A float16 tile holds gradients of the order of 1, whatever the loss is divided by.
        self.grad_weights, self.entropy_grads = _tamed(rows)[:2]

        heads = 1 if rows.ref_weight is None else 2
        limit = max(1, _TILE_BYTES // (heads * self.vocab * rows.hidden.element_size()))
        self.ranges = _ranges(count, limit)
        self.look_ahead = False
        if self.sequences is not None and objectives.scope(options.objective, options.arguments) == "sequence":
            whole = _ranges_of_sequences(torch.unique(self.sequences.start).tolist(), count, limit)
            self.look_ahead = whole is None
            self.ranges = self.ranges if whole is None else whole

        tile = max((end - begin for begin, end in self.ranges), default=0)
        self.buffers = _scratch(heads, tile, self.vocab, rows.hidden)
        self.bias = None if rows.bias is None else rows.bias.float()
        self.stats = rows.hidden.new_empty(6, count, dtype=torch.float32)  # the members of LossStats in fastsft/loss.h
        self.psi, self.weights, self.loss = rows.hidden.new_empty(3, count, dtype=torch.float32)

    def _tile(self, begin: int, end: int) -> list[Any]:
        """What both kernels take first."""
        logits = self.buffers[0][: end - begin]
        reference = self.buffers[1][: end - begin] if len(self.buffers) > 1 else None
        targets = self.rows.targets[begin:end]
        return [logits, targets, self.bias, reference, self.options.softcap, self.options.temperature]

    def reduce(self, begin: int, end: int) -> None:
        """Form the logits of these rows and their stats."""
        rows, n = self.rows, end - begin
        _product(rows.hidden[begin:end], rows.weight.t(), self.buffers[0][:n])
        if rows.ref_hidden is not None and rows.ref_weight is not None:
            _product(rows.ref_hidden[begin:end], rows.ref_weight.t(), self.buffers[1][:n])
        stats = self.stats.new_empty(6, n)
        forward = self.arguments.get("direction") == "forward"
        _KERNELS[stats.device.type].stats(*self._tile(begin, end), forward, stats)
        self.stats[:, begin:end] = stats

    def judge(self, begin: int, end: int) -> None:
        """The objective: each row's loss and weight."""
        here = slice(begin, end)
        logprob, entropy, lse, mean_logprob, divergence, _ = self.stats[:, here]
        token_weights = self.rows.token_weights[here]
        ref_logprobs = None if self.rows.ref_logprobs is None else self.rows.ref_logprobs[here]
        tokens = objectives.Tokens(logprob, entropy, token_weights, ref_logprobs, self.vocab, self.sequences, begin)
        psi, weights = objectives.OBJECTIVES[self.options.objective].term(tokens, **self.arguments)
        if self.options.label_smoothing:
            psi = psi + self.options.label_smoothing * (logprob - mean_logprob)
        if self.options.z_loss:
            psi = psi + self.options.z_loss * lse.square()
        if self.rows.ref_weight is not None:
            psi = psi + self.arguments["lam"] * divergence
        self.loss[here], self.weights[here] = token_weights * psi, weights

    def differentiate(self, begin: int, end: int) -> Tensor:
        """Replace the tile's logits by the gradient; see fastsft/loss.h for the coefficients."""
        here = slice(begin, end)
        _, entropy, lse, _, divergence, _ = self.stats[:, here]
        g, w, s = self.grad_weights[here], self.weights[here], self.options.label_smoothing
        c = self.stats.new_zeros(6, end - begin)
        on_p, on_target, uniform, on_plogp, on_plogq, on_q = c
        on_p.copy_(g * (w + 2 * self.options.z_loss * lse) if self.options.z_loss else g * w)
        on_target.copy_(-g * (w - s))
        if s:
            uniform.copy_(-g * (s / self.vocab))
        if self.entropy_grads is not None:
            on_p -= self.entropy_grads[here] * entropy
            on_plogp -= self.entropy_grads[here]
        if self.rows.ref_weight is not None:
            share = self.arguments["lam"] * g
            if self.arguments["direction"] == "forward":
                on_p += share
                on_q -= share
            else:
                on_p -= share * divergence
                on_plogp += share
                on_plogq -= share
        tile = self._tile(begin, end)
        _KERNELS[c.device.type].gradient(*tile, self.stats[:, here].contiguous(), c)
        return self.buffers[0][: end - begin]


class _Gradients:
    """Sums over tiles. The weight's is float32 until all tiles are in, so that it is rounded once."""

    def __init__(self, rows: Inputs, grads: int, *, single: bool) -> None:
        self.rows, self.grads, self.single = rows, grads, single
        self.scale = _tamed(rows)[2]
        self.dtype = gradient_dtype(rows.hidden.dtype)
        hidden, weight = rows.hidden, rows.weight
        self.d_hidden = large_empty(hidden.shape if grads & HIDDEN else (0,), hidden, self.dtype)
        self.d_bias = hidden.new_zeros(weight.shape[0] if grads & BIAS else 0, dtype=torch.float32)
        into = rows.accumulate_into
        self.in_place = into is not None and self.scale is None
        if into is not None and self.in_place:
            self.d_weight = into
        else:
            dtype = self.dtype if single and into is None else torch.float32
            self.d_weight = large_empty(weight.shape if grads & WEIGHT else (0,), weight, dtype)
        self.started = self.in_place

    def add(self, d_logits: Tensor, begin: int, end: int) -> None:
        if self.grads & HIDDEN:
            _product(d_logits, self.rows.weight, self.d_hidden[begin:end])
        if self.grads & WEIGHT:
            _product(d_logits.t(), self.rows.hidden[begin:end], self.d_weight, accumulate=self.started)
            self.started = True
        if self.grads & BIAS:
            self.d_bias += d_logits.sum(0, dtype=torch.float32)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        if not self.started:
            self.d_weight.zero_()
        if self.scale is not None:
            for gradient in (self.d_hidden, self.d_weight, self.d_bias):
                gradient.mul_(self.scale)
        if self.rows.accumulate_into is None:
            return self.d_hidden, self.d_weight.to(self.dtype), self.d_bias
        if not self.in_place and self.grads & WEIGHT:
            self.rows.accumulate_into.add_(self.d_weight)
        return self.d_hidden, self.rows.weight.new_empty(0, dtype=self.dtype), self.d_bias


def _tamed(rows: Inputs) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient's factors per token, divided by the largest in float16, where they would underflow; and that."""
    if rows.hidden.dtype != torch.float16 or rows.grad_weights.numel() == 0:
        return rows.grad_weights, rows.entropy_grads, None
    peak = rows.grad_weights.abs().max()
    if rows.entropy_grads is not None:
        peak = torch.maximum(peak, rows.entropy_grads.abs().max())
    peak = torch.where(peak > 0, peak, 1.0)
    return rows.grad_weights / peak, None if rows.entropy_grads is None else rows.entropy_grads / peak, peak


def _ranges(count: int, limit: int) -> list[_Range]:
    """Tiles of at most ``limit`` rows, as equal as can be, from the last to the first."""
    tiles = -(-count // limit)
    bounds = [count * i // tiles for i in range(tiles + 1)] if tiles else [0]
    return list(itertools.pairwise(bounds))[::-1]


def _ranges_of_sequences(starts: list[int], count: int, limit: int) -> list[_Range] | None:
    """Tiles of whole sequences, from the last to the first; None if a sequence is longer than a tile."""
    ranges: list[_Range] = []
    begin = end = count
    for start in reversed(starts):
        if end - start > limit and begin < end:
            ranges.append((begin, end))
            end = begin
        if end - start > limit:
            return None
        begin = start
    return [*ranges, (begin, end)] if begin < end else ranges


def large_empty(shape: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor that will be written at once."""
    tensor = like.new_empty(shape, dtype=dtype)
    if tensor.device.type == "cpu":
        _C.advise_huge_pages(tensor)
    return tensor


_kept = threading.local()  # the tile of the last call on the CPU, bytes


def _scratch(heads: int, rows: int, vocab: int, like: Tensor) -> Sequence[Tensor]:
    """Tiles of logits. On the CPU, where torch gives large memory back to the system, they are kept from call to call:
    faulting fresh pages in can take as long as a product. On a GPU torch's allocator keeps them."""
    if like.device.type != "cpu":
        return large_empty((heads, rows, vocab), like).unbind(0)
    size = heads * rows * vocab * like.element_size()
    kept: Tensor | None = getattr(_kept, "bytes", None)
    if kept is None or kept.numel() < size:
        kept = _kept.bytes = None  # before the larger one is taken
        kept = _kept.bytes = large_empty((size,), like, torch.uint8)
    return kept[:size].view(like.dtype).view(heads, rows, vocab).unbind(0)


def _product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    if out.device.type == "cpu":
        product(a, b, out, accumulate=accumulate)
    elif accumulate:
        out += torch.mm(a, b)
    else:
        out.copy_(torch.mm(a, b))


# --- registration -----------------------------------------------------------------------------------------------------


class _Kernels(NamedTuple):
    stats: Any
    gradient: Any


def _torch_kernels() -> _Kernels:
    from fastsft.ops import reference

    return _Kernels(reference.loss_stats, reference.loss_gradient)


_HAS_CUDA = bool(_C.cuda_architectures())
_NATIVE = _Kernels(_C.loss_stats, _C.loss_gradient)
_KERNELS = {"cpu": _NATIVE, "cuda": _NATIVE if _HAS_CUDA else _torch_kernels()}


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    grads, accumulate_into = rest[-1], rest[7]
    dtype = gradient_dtype(hidden.dtype)
    per_token = [hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4)]
    d_hidden = hidden.new_empty(hidden.shape if grads & HIDDEN else (0,), dtype=dtype)
    whole = grads & WEIGHT and accumulate_into is None
    d_weight = weight.new_empty(weight.shape if whole else (0,), dtype=dtype)
    d_bias = hidden.new_empty(weight.shape[0] if grads & BIAS else 0, dtype=torch.float32)
    return (*per_token, d_hidden, d_weight, d_bias)


_CPU_IS = Implementation("native", "C++ row kernels between packed C++ matrix products")
_CUDA_IS = (
    Implementation("native", "CUDA row kernels between cuBLAS products; not yet run on a GPU")
    if _HAS_CUDA
    else Implementation("torch", "this build has no CUDA kernels")
)
linear_cross_entropy = define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor token_weights, "
    "Tensor grad_weights, Tensor? entropy_grads, Tensor? ref_logprobs, Tensor? cu_seqlens, Tensor? ref_hidden, "
    "Tensor? ref_weight, Tensor(a!)? accumulate_into, str objective, float[] arguments, float softcap, "
    "float temperature, float label_smoothing, float z_loss, int grads) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    cpu=_run,
    cuda=_run,
    cpu_is=_CPU_IS,
    cuda_is=_CUDA_IS,
)
record("linear_logprobs", cpu=_CPU_IS, cuda=_CUDA_IS)
