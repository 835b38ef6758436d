"""The op behind linear_cross_entropy and linear_logprobs: tiles of logits through matrix products and row kernels.

Rows with weight 0 are left out before the first product. The others go through in tiles: one product makes a tile's
logits, ``loss_stats`` reduces each row to a few numbers, the objective turns those into the row's loss and weight,
``loss_gradient`` replaces the logits by their gradient, and two more products give the gradients of hidden and weight.
A tile is all that ever exists of the logits. Tiles are visited from the last to the first, so that an objective that
looks at the rest of a sequence finds it known. One that looks at all of it needs every sequence within one tile; where
a sequence is longer than a tile, the logits are formed twice. So they are in lean mode, where a tile holds a block of
the vocabulary: then a block of the weight's gradient is done with when all rows have been through it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsft import _C
from fastsft.ops import _loss_plan, _loss_products, objectives
from fastsft.ops._library import define
from fastsft.ops._loss_gradients import Gradients, tamed
from fastsft.ops._loss_inputs import BIAS, HIDDEN, PER_TOKEN, WEIGHT, Inputs, Options, gradient_dtype
from fastsft.ops._loss_plan import Plan, padded
from fastsft.ops._loss_products import HAS_WIDE_RESULTS, scratch
from fastsft.ops._loss_rows import Kept
from fastsft.ops._registry import Implementation, record


def _run(*arguments: Any) -> tuple[Tensor, ...]:
    every, options, grads = Inputs(*arguments[:12]), Options(*arguments[12:20]), arguments[20]
    bound = _bound(every.hidden, options.max_kept)
    kept = Kept(every.token_weights, bound)
    given = {name: getattr(every, name) for name in PER_TOKEN if getattr(every, name) is not None}
    rows = every._replace(**{name: kept.take(tensor) for name, tensor in given.items()})
    if rows.targets.device.type == "cpu":
        _check_on_host(rows, options)

    cu_seqlens = rows.cu_seqlens
    sequences = None if cu_seqlens is None else objectives.Sequences(kept.tokens, cu_seqlens, kept.total)
    plan = _plan(rows, options, sequences, wait=bound is None)
    sweep = _Sweep(rows, options, kept, sequences, plan)
    gradients = Gradients(rows, grads, plan)
    if plan.twice:
        for begin, end in plan.rows:
            sweep.reduce(slice(begin, end), plan.columns)
        sweep.judge(slice(0, kept.count))
    for first, last in plan.columns if grads or not plan.twice else []:
        columns = slice(first, last)
        for begin, end in plan.rows:
            here = slice(begin, end)
            if plan.twice:
                sweep.form(here, columns)
            else:
                sweep.reduce(here, plan.columns)
                sweep.judge(here)
            if grads:
                gradients.add(sweep.differentiate(here, columns), here, columns)
        gradients.finish(columns)

    per_token = [sweep.loss, sweep.stats[0], sweep.stats[1], rows.token_weights * sweep.weights]
    d_hidden, d_weight, d_bias = gradients.result()
    if grads & HIDDEN:
        d_hidden = kept.put(d_hidden)
    return (*[kept.put(t) for t in per_token], d_hidden, d_weight, d_bias)


def _bound(like: Tensor, max_kept: int | None) -> int | None:
    """How many rows there may be, where that must not be read back from the device; else None."""
    if like.device.type == "cpu":
        return None
    recorded = like.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return like.shape[0] if max_kept is None and recorded else max_kept


def _check_on_host(rows: Inputs, options: Options) -> None:
    """What is not known elsewhere before the work is queued."""
    count, vocab = rows.targets.numel(), rows.weight.shape[0]
    if options.max_kept is not None and count > options.max_kept:
        raise ValueError(f"linear_cross_entropy: max_kept: expected at least {count}, the tokens with weight, "
                         f"got {options.max_kept}")  # fmt: skip
    for found in (int(x) for x in rows.targets.aminmax()) if count else ():
        if not 0 <= found < vocab:
            raise ValueError(f"linear_cross_entropy: targets: expected ids in [0, {vocab}), got {found}")


def _plan(rows: Inputs, options: Options, sequences: objectives.Sequences | None, *, wait: bool) -> Plan:
    count, (vocab, width) = rows.targets.numel(), rows.weight.shape
    heads = 1 if rows.ref_weight is None else 2
    size = heads * rows.hidden.element_size()
    if options.lean:
        return _loss_plan.lean(count, vocab, size, width)
    over_all = objectives.scope(options.objective, options.arguments) == "sequence"
    return _loss_plan.fast(count, vocab, size * padded(vocab), sequences if over_all else None, wait=wait)


class _Sweep:
    """The rows kept, what is known of each, and the tile at hand."""

    def __init__(
        self, rows: Inputs, options: Options, kept: Kept, sequences: objectives.Sequences | None, plan: Plan
    ) -> None:
        self.vocab = rows.weight.shape[0]
        self.rows, self.options, self.empty, self.sequences = rows, options, kept.empty, sequences
        self.arguments = objectives.named(options.objective, options.arguments)
        # A float16 tile holds gradients of the order of 1, whatever the loss is divided by.
        self.grad_weights, self.entropy_grads = tamed(rows)[:2]
        self.buffers = scratch(1 if rows.ref_weight is None else 2, plan.tile, rows.hidden)
        self.bias = None if rows.bias is None else rows.bias.float()
        self.stats = rows.hidden.new_empty(6, kept.count, dtype=torch.float32)  # as LossStats in fastsft/loss.h
        self.weights, self.loss = self.stats.new_empty(2, kept.count)

    def _tile(self, rows: slice, columns: slice) -> list[Any]:
        """What both kernels take first."""
        tiles = [_matrix(buffer, rows, columns) for buffer in self.buffers]
        targets = self.rows.targets[rows] - columns.start if columns.start else self.rows.targets[rows]
        bias = None if self.bias is None else self.bias[columns]
        reference = tiles[1] if len(tiles) > 1 else None
        return [tiles[0], targets, bias, reference, self.options.softcap, self.options.temperature]

    def form(self, rows: slice, columns: slice) -> None:
        """The logits of a tile."""
        given = self.rows
        _loss_products.multiply(given.hidden[rows], given.weight[columns].t(), _matrix(self.buffers[0], rows, columns))
        if given.ref_hidden is not None and given.ref_weight is not None:
            _loss_products.multiply(
                given.ref_hidden[rows], given.ref_weight[columns].t(), _matrix(self.buffers[1], rows, columns)
            )

    def reduce(self, rows: slice, blocks: _loss_plan.Ranges) -> None:
        """Form the logits of these rows, block by block of the vocabulary, and take their stats."""
        direction = self.arguments.get("direction")
        whole = self.stats.new_empty(6, rows.stop - rows.start)
        for begin, end in blocks:
            columns = slice(begin, end)
            self.form(rows, columns)
            stats = torch.empty_like(whole, dtype=torch.float32)
            _KERNELS[stats.device.type].stats(*self._tile(rows, columns), direction == "forward", stats)
            whole = stats if begin == 0 else _merged(whole, begin, stats, end - begin, direction)
        self.stats[:, rows] = whole

    def judge(self, rows: slice) -> None:
        """The objective: each row's loss and weight."""
        logprob, entropy, lse, mean_logprob, divergence, _ = self.stats[:, rows]
        token_weights = self.rows.token_weights[rows]
        ref_logprobs = None if self.rows.ref_logprobs is None else self.rows.ref_logprobs[rows]
        tokens = objectives.Tokens(
            logprob, entropy, token_weights, ref_logprobs, self.vocab, self.sequences, rows.start
        )
        psi, weights = objectives.OBJECTIVES[self.options.objective].term(tokens, **self.arguments)
        if self.options.label_smoothing:
            psi = psi + self.options.label_smoothing * (logprob - mean_logprob)
        if self.options.z_loss:
            psi = psi + self.options.z_loss * lse.square()
        if self.rows.ref_weight is not None:
            psi = psi + self.arguments["lam"] * divergence
        self.loss[rows], self.weights[rows] = token_weights * psi, weights

    def differentiate(self, rows: slice, columns: slice) -> Tensor:
        """Replace the tile's logits by the gradient; see fastsft/loss.h for the coefficients."""
        _, entropy, lse, _, divergence, _ = self.stats[:, rows]
        g, w, s = self.grad_weights[rows], self.weights[rows], self.options.label_smoothing
        c = self.stats.new_zeros(6, rows.stop - rows.start)
        on_p, on_target, uniform, on_plogp, on_plogq, on_q = c
        on_p.copy_(g * (w + 2 * self.options.z_loss * lse) if self.options.z_loss else g * w)
        on_target.copy_(-g * (w - s))
        if s:
            uniform.copy_(-g * (s / self.vocab))
        if self.entropy_grads is not None:
            on_p -= self.entropy_grads[rows] * entropy
            on_plogp -= self.entropy_grads[rows]
        if self.rows.ref_weight is not None:
            share = self.arguments["lam"] * g
            if self.arguments["direction"] == "forward":
                on_p += share
                on_q -= share
            else:
                on_p -= share * divergence
                on_plogp += share
                on_plogq -= share
        if self.empty is not None:
            c.masked_fill_(self.empty[rows], 0.0)
        tile = self._tile(rows, columns)
        _KERNELS[c.device.type].gradient(*tile, self.stats[:, rows].contiguous(), c)
        return _matrix(self.buffers[0], rows, columns)


def _matrix(buffer: Tensor, rows: slice, columns: slice) -> Tensor:
    """The tile [rows, columns] at a buffer's start."""
    n, m = rows.stop - rows.start, columns.stop - columns.start
    return buffer[: n * padded(m)].view(n, padded(m))[:, :m]


def _merged(a: Tensor, a_columns: int, b: Tensor, b_columns: int, direction: str | None) -> Tensor:
    """The stats [6, n] of two blocks of columns as one, in float64.

    With u the logits, v the reference's, and E_p the mean under softmax(u): the entropy is lse - E_p[u], the divergence
    of p from q E_p[u - v] - lse + reference_lse, and E_p over both blocks that of each times its part of p.
    """
    a, b = a.double(), b.double()
    lse, out = torch.logaddexp(a[2], b[2]), torch.zeros_like(a)

    def mean(parts: tuple[Tensor, Tensor], of_a: Tensor, of_b: Tensor) -> Tensor:
        in_a, in_b = parts[0] * of_a, parts[1] * of_b
        return torch.where(parts[0] == 0, 0.0, in_a) + torch.where(parts[1] == 0, 0.0, in_b)

    def logit(stats: Tensor, member: int) -> Tensor:
        """Of a log-probability, which is NaN where the bias excludes the whole block."""
        return torch.where(stats[2] == -torch.inf, -torch.inf, stats[member] + stats[2])

    parts = (a[2] - lse).exp(), (b[2] - lse).exp()
    out[0] = torch.maximum(logit(a, 0), logit(b, 0)) - lse  # -inf in the block that the target is not in
    out[1] = lse - mean(parts, a[2] - a[1], b[2] - b[1])
    out[2] = lse
    out[3] = (logit(a, 3) * a_columns + logit(b, 3) * b_columns) / (a_columns + b_columns) - lse
    if direction is not None:
        out[5] = other = torch.logaddexp(a[5], b[5])
        if direction == "forward":
            parts = (a[5] - other).exp(), (b[5] - other).exp()
        sign = 1 if direction == "reverse" else -1  # of u - v; the divergence of q from p exchanges the two
        out[4] = mean(parts, *[x[4] + sign * (x[2] - x[5]) for x in (a, b)]) - sign * (lse - other)
    return out


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
if not HAS_WIDE_RESULTS:
    _CUDA_IS = Implementation(
        _CUDA_IS.kind, f"{_CUDA_IS.reason}; before torch 2.8 sums over tiles are of 16-bit products"
    )
linear_cross_entropy = define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor token_weights, "
    "Tensor grad_weights, Tensor? entropy_grads, Tensor? ref_logprobs, Tensor? cu_seqlens, Tensor? ref_hidden, "
    "Tensor? ref_weight, Tensor(a!)? accumulate_into, str objective, float[] arguments, float softcap, "
    "float temperature, float label_smoothing, float z_loss, bool lean, SymInt? max_kept, int grads) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    cpu=_run,
    cuda=_run,
    cpu_is=_CPU_IS,
    cuda_is=_CUDA_IS,
)
record("linear_logprobs", cpu=_CPU_IS, cuda=_CUDA_IS)
