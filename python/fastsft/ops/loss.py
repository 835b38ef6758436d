"""Linear cross-entropy with per-token weights: the projection onto the vocabulary and the loss in one op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsft.ops._library import autocast
from fastsft.ops._loss_checks import (
    check_inputs,
    check_objective,
    check_per_token,
    check_reduction,
    checked_options,
)
from fastsft.ops._loss_inputs import BIAS, HIDDEN, WEIGHT, Inputs, Options
from fastsft.ops._loss_tiles import linear_cross_entropy as _op
from fastsft.ops._require import require


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
    objective_args: Mapping[str, Any] | None = None,
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
    reference: tuple[Tensor, Tensor] | None = None,
    accumulate_into: Tensor | None = None,
    lean: bool = False,
    max_kept: int | None = None,
) -> Tensor | tuple[Tensor, LossAux]:
    """Weighted cross-entropy of ``softmax(hidden @ weight.T + bias)`` against the targets.

    Gradients are formed in the forward pass; memory beyond them is one tile of logits, at most 256 MiB, whatever T, and
    the float32 sum of weight's gradient where there are several tiles.

    Args:
        hidden: [T, H], float32, bfloat16 or float16.
        weight: [V, H], like hidden. Its gradient is summed in float32 and rounded once.
        targets: int64 [T] in [0, V), or ``ignore_index``.
        token_weights: float32 [T], not differentiated; 0 leaves a token out, negative weights are legal. Default 1.
        objective: with l the target's log-probability, p = exp(l), H the entropy, r ``ref_logprobs``, q = exp(l - r)
            and sg a constant:
            ``nll`` -l;
            ``dft`` -sg(p) l (arXiv 2508.05629);
            ``power`` (1 - p^alpha) / alpha (2510.00526);
            ``threshold`` -1[p >= tau] l (same);
            ``focal`` -sg((1 - p)^gamma) l;
            ``entropy_gate`` -sg(exp(-H)) l, or with ``form="normalized"`` -sg(H / log V) l (2601.02151);
            ``ratio_clip`` -min(q, 1 + epsilon) (2508.17784, 2507.01679);
            ``hpt`` -min(q A, clip(q, 1 - epsilon, 1 + epsilon) A), where A is ``token_weights`` (2509.04419);
            ``k3`` -l + beta (exp(r - l) - (r - l) - 1);
            ``pear_token``, ``pear_block``, ``pear_sequence`` -sg(G) l, G from the later tokens' l - r, per token, per
            ``block`` tokens or over the whole sequence (2602.01058);
            ``iw_sequence`` -sg(clip(exp(sum of l - r over the sequence), low, high)) l (2507.12856);
            ``f_divergence`` psi_f(l - r) with ``f`` kl, pearson or hellinger, per token, or with ``level="sequence"``
            of the summed ratio (2507.00018);
            ``asft`` -sg(p) l + lam KL over the vocabulary, to or from the ``reference`` by ``direction`` (2509.23753).
            docs/objectives.md has the formulas in full, with every argument's default.
        objective_args: the arguments named above.
        ref_logprobs: float32 [T], r in the formulas, for the objectives with an r.
        cu_seqlens: int32 [B + 1], where sequences begin and end, for the objectives over sequences. Tokens left out
            are not part of their sequence.
        bias: [V].
        reduction: ``mean`` divides by the sum of the weights of the tokens kept, or by ``normalizer``; ``sum``;
            ``none`` (its backward pass costs a fourth product, as each token has its own upstream gradient).
        normalizer: the divisor of ``mean``: over the micro-batches of one optimizer step it is their summed weight.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 leaves them.
        temperature: divides the logits, after the cap.
        label_smoothing: s in [0, 1), only with ``nll``: the target distribution is (1 - s) e_y + s / V.
        z_loss: c adds ``c * logsumexp(logits)^2`` to each token's loss.
        return_aux: also return a :class:`LossAux`.
        reference: for ``asft``, the hidden states [T, H'] and head [V, H'] of the reference model, like hidden.
        accumulate_into: float32 [V, H]: takes the gradient of weight, added in the forward pass and for an upstream
            gradient of 1; weight then gets none from autograd. Not with ``none``.
        lean: form the logits twice, block by block of the vocabulary: four products instead of three, for less memory.
            A tile of logits and all else takes at most 64 MiB, but hidden's gradient is summed up in float32.
        max_kept: an upper bound of the number of tokens with weight. On a GPU the host waits once a call to read that
            number back, unless it is bounded: then as many rows are multiplied as the bound says, and more tokens than
            that make the loss NaN (on a CPU, an error). In a CUDA graph it is all rows unless there is a bound.

    Returns:
        A 0-d float32 loss (float32 [T] for ``none``), and the aux. With all weights zero both loss and gradients are 0.

    Raises:
        ValueError: shapes, dtypes or values out of contract, naming the argument.
    """
    op = "linear_cross_entropy"
    hidden, weight, bias, *heads = autocast(hidden, weight, bias, *(reference or ()))
    check_inputs(op, hidden, weight, targets, bias)
    options = checked_options(
        op, objective, objective_args, softcap, temperature, label_smoothing, z_loss, lean, max_kept
    )
    check_objective(op, options, targets, ref_logprobs, cu_seqlens, heads, hidden, weight)
    check_reduction(op, options, reduction, normalizer, accumulate_into, weight)
    weights = _weights(op, targets, token_weights, ignore_index)
    ref_hidden, ref_weight = [t.detach() for t in heads] or (None, None)
    constants = (None if ref_logprobs is None else ref_logprobs.detach(), cu_seqlens, ref_hidden, ref_weight)
    enabled = torch.is_grad_enabled()
    inputs = (hidden, weight, bias, targets, weights)
    if reduction == "none":
        loss, *aux = _PerToken.apply(*inputs, *constants, options)  # type: ignore[no-untyped-call]
    else:
        scale = _scale(op, weights, reduction, normalizer)
        into = accumulate_into if enabled else None
        loss, *aux = _Reduced.apply(*inputs, scale, *constants, into, options, enabled)  # type: ignore[no-untyped-call]
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
    temperature: float = 1.0,
    lean: bool = False,
    max_kept: int | None = None,
    values: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target under ``softmax(hidden @ weight.T + bias)``, to build other objectives on.

    Differentiable per token, in the entropy too. The backward pass recomputes the logits tile by tile (four products).

    Args:
        hidden, weight, targets, bias, ignore_index, softcap, temperature, lean, max_kept: as in
            :func:`linear_cross_entropy`.
        return_entropy: also return the entropy of each token's distribution, in nats.
        values: float32 [T], the log-probabilities as something else has computed them, such as the engine that drew the
            targets: they are the result, with this op's gradients, and no product is made before the backward pass.
            Not with ``return_entropy``.

    Returns:
        float32 [T], 0 at ignored targets; and the entropies [T].

    Raises:
        ValueError: shapes, dtypes or values out of contract, naming the argument.
    """
    op = "linear_logprobs"
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_inputs(op, hidden, weight, targets, bias)
    options = checked_options(op, "nll", None, softcap, temperature, 0.0, 0.0, lean, max_kept)
    weights = _weights(op, targets, None, ignore_index)
    if values is not None:
        require(not return_entropy, op, "values", "None beside return_entropy", "log-probabilities")
        check_per_token(op, "values", values, targets)
    logprob, entropy = _LogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, weights, values, options
    )
    return (logprob, entropy) if return_entropy else logprob


def _weights(op: str, targets: Tensor, token_weights: Tensor | None, ignore_index: int) -> Tensor:
    """float32 [T], 0 where the target is ignored."""
    kept = targets != ignore_index
    if token_weights is None:
        return kept.to(torch.float32)
    check_per_token(op, "token_weights", token_weights, targets)
    return torch.where(kept, token_weights.detach(), 0.0)


def _scale(op: str, weights: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    """What the summed loss is multiplied by; 0 for a divisor of 0."""
    if reduction == "sum":
        return torch.ones((), dtype=torch.float32, device=weights.device)
    if normalizer is None:
        divisor = weights.sum()
    elif not isinstance(normalizer, Tensor):  # filled in on the device: a copy would wait for it
        divisor = torch.full((), normalizer, dtype=torch.float32, device=weights.device)
    else:
        divisor = normalizer.detach().to(weights.device, torch.float32)
        require(divisor.dim() == 0, op, "normalizer", "a number", f"a tensor of shape {list(divisor.shape)}")
    return torch.where(divisor == 0, 0.0, 1.0 / divisor)


# --- autograd ---------------------------------------------------------------------------------------------------------


def _wanted(ctx: Any) -> int:
    hidden, weight, bias = ctx.needs_input_grad[:3]
    return int(HIDDEN * hidden + WEIGHT * weight + BIAS * bias)


def _is_one(upstream: Tensor) -> bool:
    """Known without waiting for a device, and not while a graph is traced."""
    return upstream.device.type == "cpu" and not torch.compiler.is_compiling() and upstream.item() == 1


def _finish(ctx: Any, gradients: Any, upstream: Tensor | None) -> list[Tensor | None]:
    """Times the upstream gradient where there is one, in the inputs' types, None where nothing is wanted."""
    if upstream is not None and _is_one(upstream):
        upstream = None
    out: list[Tensor | None] = []
    for wanted, gradient, dtype in zip(ctx.needs_input_grad[:3], gradients, ctx.dtypes, strict=True):
        if wanted and upstream is not None:
            gradient = gradient * upstream
        out.append(gradient.to(dtype) if wanted else None)
    return out


class _Reduced(torch.autograd.Function):
    """Gradients are formed in forward; backward multiplies them by the upstream scalar."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, weights: Tensor, scale: Tensor,
                ref_logprobs: Any, cu_seqlens: Any, ref_hidden: Any, ref_weight: Any, into: Any, options: Options,
                enabled: bool) -> Any:  # fmt: skip
        inputs = Inputs(hidden, weight, bias, targets, weights, weights * scale, None, ref_logprobs, cu_seqlens,
                        ref_hidden, ref_weight, into)  # fmt: skip
        grads = _wanted(ctx) if enabled else 0
        loss, *aux, d_hidden, d_weight, d_bias = _op(*inputs, *options, grads if into is None else grads | WEIGHT)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype)
        ctx.accumulated = into is not None
        ctx.mark_non_differentiable(*aux)
        return (loss.sum(dtype=torch.float64) * scale).to(torch.float32), *aux

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        gradients = _finish(ctx, ctx.saved_tensors, upstream)
        if ctx.accumulated:
            gradients[1] = None
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - 3))


class _PerToken(torch.autograd.Function):
    """One loss per token; backward runs the tiles again with the upstream gradient as a further weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, weights: Tensor,
                ref_logprobs: Any, cu_seqlens: Any, ref_hidden: Any, ref_weight: Any, options: Options
                ) -> Any:  # fmt: skip
        constants = (ref_logprobs, cu_seqlens, ref_hidden, ref_weight)
        inputs = Inputs(hidden, weight, bias, targets, weights, weights, None, *constants)
        loss, *aux, _, _, _ = _op(*inputs, *options, 0)
        ctx.save_for_backward(hidden, weight, bias, targets, weights, *constants)
        ctx.options = options
        ctx.dtypes = (hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype)
        ctx.mark_non_differentiable(*aux)
        return loss, *aux

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        hidden, weight, bias, targets, weights, *constants = ctx.saved_tensors
        inputs = Inputs(hidden, weight, bias, targets, weights, weights * upstream, None, *constants)
        gradients = _finish(ctx, _op(*inputs, *ctx.options, _wanted(ctx))[4:], None)
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - 3))


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, weights: Tensor,
                values: Tensor | None, options: Options) -> Any:  # fmt: skip
        if values is None:
            _, logprob, entropy, *_ = _op(*Inputs(hidden, weight, bias, targets, weights, weights), *options, 0)
        else:
            logprob, entropy = torch.where(weights != 0, values, 0.0), torch.zeros_like(values)
        ctx.save_for_backward(hidden, weight, bias, targets, weights)
        ctx.options = options
        ctx.dtypes = (hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype)
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_logprob: Tensor, d_entropy: Tensor) -> Any:
        hidden, weight, bias, targets, weights = ctx.saved_tensors
        inputs = Inputs(hidden, weight, bias, targets, weights, -d_logprob.float(), d_entropy.float().contiguous())
        gradients = _finish(ctx, _op(*inputs, *ctx.options, _wanted(ctx))[4:], None)
        return (*gradients, *[None] * (len(ctx.needs_input_grad) - 3))
