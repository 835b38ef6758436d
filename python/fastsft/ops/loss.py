"""Linear cross-entropy with per-token weights: the projection onto the vocabulary and the loss in one op.

Rows with weight 0 are left out before the first product. The others go through in tiles of rows: torch's matrix
product makes the logits of a tile, the native row kernel turns them into losses and, in place, into their gradient, and
two more products give the gradients of hidden and weight. So a loss costs three products, not four, and a tile is all
that ever exists of the logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsft import _C
from fastsft.ops._library import Implementation, define, record

_TILE_BYTES = 64 << 20  # of logits; large enough for the products to run at full speed

# name -> (number in fastsft/loss.h, its argument and that argument's default, does it need ref_logprobs)
OBJECTIVES: dict[str, tuple[int, tuple[str, float] | None, bool]] = {
    "nll": (0, None, False),
    "dft": (1, None, False),
    "power": (2, ("alpha", 1.0), False),
    "threshold": (3, ("tau", 0.1), False),
    "focal": (4, ("gamma", 2.0), False),
    "entropy_gate": (5, None, False),
    "ratio_clip": (6, ("epsilon", 0.2), True),
    "k3": (7, ("beta", 0.1), True),
}


class LossAux(NamedTuple):
    """Per token, float32 [T], 0 where nothing is trained: log-probability of the target, entropy, weight applied."""

    logprob: Tensor
    entropy: Tensor
    weight: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    *,
    objective: str = "nll",
    objective_args: dict[str, float] | None = None,
    ref_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    softcap: float = 0.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_aux: bool = False,
) -> Tensor | tuple[Tensor, LossAux]:
    """Weighted cross-entropy of ``softmax(hidden @ weight.T + bias)`` against the targets.

    Gradients are formed in the forward pass; memory beyond them is one tile of logits, whatever T and V.

    Args:
        hidden: [T, H], float32, bfloat16 or float16.
        weight: [V, H], like hidden. Its gradient accumulates over tiles in float32.
        targets: int64 [T] in [0, V), or ``ignore_index``.
        token_weights: float32 [T], not differentiated; 0 leaves a token out, negative weights are legal. Default 1.
        objective: with l the target's log-probability, p = exp(l), H the entropy, r ``ref_logprobs`` and sg a constant:
            ``nll`` -l; ``dft`` -sg(p) l (arXiv 2508.05629); ``power`` (1 - p^alpha) / alpha (2510.00526);
            ``threshold`` -1[p >= tau] l (same); ``focal`` -sg((1 - p)^gamma) l; ``entropy_gate`` -sg(exp(-H)) l
            (2601.02151); ``ratio_clip`` -min(q, 1 + epsilon), q = exp(l - r) (2508.17784); ``k3`` -l + beta
            (exp(r - l) - (r - l) - 1).
        objective_args: the Greek letters above, by name.
        ref_logprobs: float32 [T], for ``ratio_clip`` and ``k3``.
        cu_seqlens: reserved for objectives over whole sequences; none of the above takes it.
        bias: [V].
        reduction: ``mean`` divides by the sum of the weights of the tokens kept, or by ``normalizer``; ``sum``;
            ``none`` (its backward pass costs a fourth product, as each token has its own upstream gradient).
        normalizer: the divisor of ``mean``: over the micro-batches of one optimizer step it is their summed weight.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 leaves them.
        temperature: divides the logits.
        label_smoothing: s in [0, 1), only with ``nll``: the target distribution is (1 - s) e_y + s / V.
        z_loss: c adds ``c * logsumexp(logits)^2`` to each token's loss.
        return_aux: also return a :class:`LossAux`.

    Returns:
        A 0-d float32 loss (float32 [T] for ``none``), and the aux. With all weights zero both loss and gradients are 0.

    Raises:
        ValueError: shapes, dtypes or values out of contract, naming the argument.
    """
    op = "linear_cross_entropy"
    number, argument = _objective(op, objective, objective_args, ref_logprobs, cu_seqlens, label_smoothing)
    _check(op, hidden, weight, targets, bias, softcap)
    _require(temperature > 0, op, "temperature", "more than 0", temperature)
    _require(0 <= label_smoothing < 1, op, "label_smoothing", "a value in [0, 1)", label_smoothing)
    _require(reduction in ("mean", "sum", "none"), op, "reduction", "'mean', 'sum' or 'none'", repr(reduction))
    _require(normalizer is None or reduction == "mean", op, "normalizer", "reduction='mean' with it", repr(reduction))
    weights = _weights(op, targets, token_weights, ignore_index)
    if ref_logprobs is not None:
        _per_token(op, "ref_logprobs", ref_logprobs, targets)
        ref_logprobs = ref_logprobs.detach()
    options = (number, argument, float(softcap), float(temperature), float(label_smoothing), float(z_loss))
    inputs = (hidden, weight, bias, targets, weights, ref_logprobs)
    if reduction == "none":
        loss, *aux = _PerToken.apply(*inputs, *options)  # type: ignore[no-untyped-call]
    else:
        if reduction == "sum":
            scale = torch.ones((), dtype=torch.float32, device=hidden.device)
        else:
            divisor = weights.sum() if normalizer is None else torch.as_tensor(normalizer, device=hidden.device)
            divisor = divisor.detach().to(torch.float32)
            scale = torch.where(divisor == 0, 0.0, 1.0 / divisor)
        loss, *aux = _Reduced.apply(*inputs, scale, *options)  # type: ignore[no-untyped-call]
    return (loss, LossAux(*aux)) if return_aux else loss


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target under ``softmax(hidden @ weight.T + bias)``, to build other objectives on.

    Differentiable per token, in the entropy too. The backward pass recomputes the logits tile by tile (four products).

    Args:
        hidden, weight, targets, bias, ignore_index, softcap: as in :func:`linear_cross_entropy`.
        return_entropy: also return the entropy of each token's distribution, in nats.

    Returns:
        float32 [T], 0 at ignored targets; and the entropies [T].

    Raises:
        ValueError: shapes, dtypes or values out of contract, naming the argument.
    """
    op = "linear_logprobs"
    _check(op, hidden, weight, targets, bias, softcap)
    weights = _weights(op, targets, None, ignore_index)
    inputs = (hidden, weight, bias, targets, weights, float(softcap))
    logprob, entropy = _LogProbs.apply(*inputs)  # type: ignore[no-untyped-call]
    return (logprob, entropy) if return_entropy else logprob


# --- checks -----------------------------------------------------------------------------------------------------------


def _require(condition: bool, op: str, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{op}: {name}: expected {expected}, got {got}")


def _per_token(op: str, name: str, tensor: Tensor, targets: Tensor) -> None:
    ok = tensor.shape == targets.shape and tensor.dtype == torch.float32
    _require(ok, op, name, f"float32 {list(targets.shape)}", f"{tensor.dtype} {list(tensor.shape)}")


def _check(op: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float) -> None:
    floats = (torch.float32, torch.bfloat16, torch.float16)
    _require(hidden.dim() == 2 and hidden.dtype in floats, op, "hidden", "[T, H] of float32, bfloat16 or float16",
             f"{hidden.dtype} {list(hidden.shape)}")  # fmt: skip
    ok = weight.dim() == 2 and weight.shape[1] == hidden.shape[1] and weight.dtype == hidden.dtype
    _require(ok, op, "weight", f"{hidden.dtype} [V, {hidden.shape[1]}]", f"{weight.dtype} {list(weight.shape)}")
    ok = targets.shape == hidden.shape[:1] and targets.dtype == torch.int64
    _require(ok, op, "targets", f"int64 [{hidden.shape[0]}]", f"{targets.dtype} {list(targets.shape)}")
    if bias is not None:
        ok = bias.shape == weight.shape[:1] and bias.dtype in floats
        _require(ok, op, "bias", f"floats [{weight.shape[0]}]", f"{bias.dtype} {list(bias.shape)}")
    _require(softcap >= 0, op, "softcap", "at least 0", softcap)


def _weights(op: str, targets: Tensor, token_weights: Tensor | None, ignore_index: int) -> Tensor:
    """float32 [T], 0 where the target is ignored."""
    kept = targets != ignore_index
    if token_weights is None:
        return kept.to(torch.float32)
    _per_token(op, "token_weights", token_weights, targets)
    return torch.where(kept, token_weights.detach(), 0.0)


def _objective(
    op: str,
    name: str,
    args: dict[str, float] | None,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    label_smoothing: float,
) -> tuple[int, float]:
    _require(name in OBJECTIVES, op, "objective", f"one of {', '.join(OBJECTIVES)}", repr(name))
    number, argument, needs_reference = OBJECTIVES[name]
    known = {argument[0]} if argument else set()
    given = dict(args or {})
    _require(set(given) <= known, op, "objective_args", f"for {name!r} only {sorted(known)}", sorted(given))
    _require((ref_logprobs is not None) == needs_reference, op, "ref_logprobs",
             f"{'a tensor' if needs_reference else 'None'} for {name!r}",
             "None" if ref_logprobs is None else "a tensor")  # fmt: skip
    _require(cu_seqlens is None, op, "cu_seqlens", f"None for {name!r}", "a tensor")
    _require(label_smoothing == 0 or name == "nll", op, "label_smoothing", f"0 for {name!r}", label_smoothing)
    value = float(given.get(argument[0], argument[1])) if argument else 0.0
    _require(name != "power" or value > 0, op, "objective_args['alpha']", "more than 0", value)
    return number, value


# --- the op -----------------------------------------------------------------------------------------------------------

_HIDDEN, _WEIGHT, _BIAS = 1, 2, 4  # bits of `grads`: which gradients to form
_Options = tuple[int, float, float, float, float, float]


def _rows_native(logits: Tensor, bias: Tensor | None, per_token: list[Tensor | None], options: Any, write: bool,
                 outputs: list[Tensor]) -> None:  # fmt: skip
    arguments: list[Any] = [logits, bias, *per_token, *options, write, *outputs]
    _C.loss_rows(*arguments)


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    token_weights: Tensor,
    grad_weights: Tensor,
    entropy_grads: Tensor | None,
    ref_logprobs: Tensor | None,
    objective: int,
    argument: float,
    softcap: float,
    temperature: float,
    label_smoothing: float,
    z_loss: float,
    grads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    total = hidden.shape[0]
    vocab = weight.shape[0]
    device = hidden.device
    outputs = [torch.zeros(total, dtype=torch.float32, device=device) for _ in range(4)]
    d_hidden = torch.zeros_like(hidden) if grads & _HIDDEN else hidden.new_empty(0)
    # float32 [V, H]: sums over tiles are not rounded to the weight's own type in between
    d_weight = torch.zeros(weight.shape if grads & _WEIGHT else (0,), dtype=torch.float32, device=device)
    d_bias = torch.zeros(vocab if grads & _BIAS else 0, dtype=torch.float32, device=device)
    kept = token_weights.nonzero()[:, 0]
    rows = kept.numel()
    everything = rows == total

    def take(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or everything else tensor[kept]

    x = hidden if everything else hidden[kept]
    per_token = [take(t) for t in (targets, token_weights, grad_weights, entropy_grads, ref_logprobs)]
    compact = outputs if everything else [o.new_empty(rows) for o in outputs]
    tile = max(1, min(rows, _TILE_BYTES // (vocab * hidden.element_size())))
    buffer = hidden.new_empty(tile, vocab)
    bias32 = None if bias is None else bias.float()
    options = (objective, argument, softcap, temperature, label_smoothing, z_loss)
    for begin in range(0, rows, tile):
        end = min(begin + tile, rows)
        logits = torch.mm(x[begin:end], weight.t(), out=buffer[: end - begin])
        part = [None if t is None else t[begin:end] for t in per_token]
        _ROWS[device.type](logits, bias32, part, options, grads != 0, [o[begin:end] for o in compact])
        if grads & _HIDDEN:
            gradient = torch.mm(logits, weight)
            if everything:
                d_hidden[begin:end] = gradient
            else:
                d_hidden.index_copy_(0, kept[begin:end], gradient)
        if grads & _WEIGHT:
            if d_weight.dtype == logits.dtype:
                d_weight.addmm_(logits.t(), x[begin:end])
            else:
                d_weight += torch.mm(logits.t(), x[begin:end])
        if grads & _BIAS:
            d_bias += logits.sum(0, dtype=torch.float32)
    if not everything:
        for full, part_of in zip(outputs, compact, strict=True):
            full.index_copy_(0, kept, part_of)
    return outputs[0], outputs[1], outputs[2], outputs[3], d_hidden, d_weight, d_bias


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any) -> Any:
    grads = rest[-1]
    per_token = [hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(4)]
    d_hidden = torch.empty_like(hidden) if grads & _HIDDEN else hidden.new_empty(0)
    d_weight = hidden.new_empty(weight.shape if grads & _WEIGHT else (0,), dtype=torch.float32)
    d_bias = hidden.new_empty(weight.shape[0] if grads & _BIAS else 0, dtype=torch.float32)
    return (*per_token, d_hidden, d_weight, d_bias)


def _rows_torch(logits: Tensor, bias: Tensor | None, per_token: list[Tensor | None], options: Any, write: bool,
                outputs: list[Tensor]) -> None:  # fmt: skip
    """The row kernel in plain torch, for devices the build has no kernel for."""
    from fastsft.ops import reference

    arguments: list[Any] = [logits.float(), bias, *per_token, *options]
    results = reference.loss_rows(*arguments)
    for output, result in zip(outputs, results[:4], strict=True):
        output.copy_(result)
    if write:
        logits.copy_(results[4])


_HAS_CUDA = bool(_C.cuda_architectures())
_ROWS = {"cpu": _rows_native, "cuda": _rows_native if _HAS_CUDA else _rows_torch}
_CPU_IS = Implementation("native", "C++ row kernel between torch's matrix products")
_CUDA_IS = (
    Implementation("native", "CUDA row kernel between torch's matrix products; not yet run on a GPU")
    if _HAS_CUDA
    else Implementation("torch", "this build has no CUDA kernels")
)
_op = define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor token_weights, "
    "Tensor grad_weights, Tensor? entropy_grads, Tensor? ref_logprobs, int objective, float argument, float softcap, "
    "float temperature, float label_smoothing, float z_loss, int grads) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    cpu=_run,
    cuda=_run,
    cpu_is=_CPU_IS,
    cuda_is=_CUDA_IS,
)
record("linear_logprobs", cpu=_CPU_IS, cuda=_CUDA_IS)


def _wanted(ctx: Any) -> int:
    hidden, weight, bias = ctx.needs_input_grad[:3]
    return int(_HIDDEN * hidden + _WEIGHT * weight + _BIAS * bias)


def _finish(ctx: Any, gradients: tuple[Tensor, Tensor, Tensor], like: tuple[torch.dtype, ...], upstream: Any) -> Any:
    """Scale by the upstream gradient where there is one, round to the inputs' types, None where nothing is wanted."""
    out = []
    for wanted, gradient, dtype in zip(ctx.needs_input_grad[:3], gradients, like, strict=True):
        if wanted and upstream is not None:
            gradient = gradient * upstream
        out.append(gradient.to(dtype) if wanted else None)
    return out


class _Reduced(torch.autograd.Function):
    """Gradients are formed in forward; backward multiplies them by the upstream scalar."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, weights: Tensor, ref: Any,
                scale: Tensor, *options: Any) -> Any:  # fmt: skip
        loss, *aux, d_hidden, d_weight, d_bias = _op(
            hidden, weight, bias, targets, weights, weights * scale, None, ref, *options, _wanted(ctx)
        )
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype)
        ctx.mark_non_differentiable(*aux)
        return (loss.sum(dtype=torch.float64) * scale).to(torch.float32), *aux

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        gradients = _finish(ctx, ctx.saved_tensors, ctx.dtypes, upstream)
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - 3))


class _PerToken(torch.autograd.Function):
    """One loss per token; backward runs the tiles again with the upstream gradient as a further weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, weights: Tensor, ref: Any,
                *options: Any) -> Any:  # fmt: skip
        loss, *aux, _, _, _ = _op(hidden, weight, bias, targets, weights, weights, None, ref, *options, 0)
        ctx.save_for_backward(hidden, weight, bias, targets, weights, ref)
        ctx.options = options
        ctx.mark_non_differentiable(*aux)
        return loss, *aux

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        hidden, weight, bias, targets, weights, ref = ctx.saved_tensors
        results = _op(hidden, weight, bias, targets, weights, weights * upstream, None, ref, *ctx.options, _wanted(ctx))
        dtypes = (hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype)
        return (*_finish(ctx, results[4:], dtypes, None), *[None] * (len(ctx.needs_input_grad) - 3))


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, weights: Tensor, softcap: float
                ) -> Any:  # fmt: skip
        _, logprob, entropy, *_ = _op(
            hidden, weight, bias, targets, weights, weights, None, None, 0, 0.0, softcap, 1.0, 0.0, 0.0, 0
        )
        ctx.save_for_backward(hidden, weight, bias, targets, weights)
        ctx.softcap = softcap
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_logprob: Tensor, d_entropy: Tensor) -> Any:
        hidden, weight, bias, targets, weights = ctx.saved_tensors
        results = _op(
            hidden, weight, bias, targets, weights, -d_logprob.float(), d_entropy.float().contiguous(), None, 0, 0.0,
            ctx.softcap, 1.0, 0.0, 0.0, _wanted(ctx),
        )  # fmt: skip
        dtypes = (hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype)
        return (*_finish(ctx, results[4:], dtypes, None), None, None, None)
