"""Argument checks of linear_cross_entropy and linear_logprobs: what the op itself may take for granted.

Every error names the op and the argument, says what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastsft.ops import objectives
from fastsft.ops._loss_inputs import Options
from fastsft.ops._require import require


def check_per_token(op: str, name: str, tensor: Tensor, targets: Tensor) -> None:
    ok = tensor.shape == targets.shape and tensor.dtype == torch.float32
    require(ok, op, name, f"float32 {list(targets.shape)}", f"{tensor.dtype} {list(tensor.shape)}")


def check_inputs(op: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    floats = (torch.float32, torch.bfloat16, torch.float16)
    ok, got = hidden.dim() == 2 and hidden.dtype in floats, f"{hidden.dtype} {list(hidden.shape)}"
    require(ok, op, "hidden", "[T, H] of float32, bfloat16 or float16", got)
    ok = weight.dim() == 2 and weight.shape[1] == hidden.shape[1] and weight.dtype == hidden.dtype
    got = f"{weight.dtype} {list(weight.shape)}"
    require(ok, op, "weight", f"{hidden.dtype} [V, {hidden.shape[1]}]", got)
    require(weight.shape[0] > 0, op, "weight", "a vocabulary of at least 1", got)
    ok = targets.shape == hidden.shape[:1] and targets.dtype == torch.int64
    require(ok, op, "targets", f"int64 [{hidden.shape[0]}]", f"{targets.dtype} {list(targets.shape)}")
    if bias is not None:
        ok = bias.shape == weight.shape[:1] and bias.dtype in floats
        require(ok, op, "bias", f"floats [{weight.shape[0]}]", f"{bias.dtype} {list(bias.shape)}")


def checked_options(
    op: str,
    objective: str,
    objective_args: Mapping[str, Any] | None,
    softcap: float,
    temperature: float,
    label_smoothing: float,
    z_loss: float,
    lean: bool,
    max_kept: int | None,
) -> Options:
    known = objectives.OBJECTIVES
    require(objective in known, op, "objective", f"one of {', '.join(known)}", repr(objective))
    try:
        arguments = objectives.numbers(objective, objective_args or {})
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from None
    require(math.isfinite(softcap) and softcap >= 0, op, "softcap", "a finite number of at least 0", softcap)
    require(math.isfinite(temperature) and temperature > 0, op, "temperature", "a finite number above 0", temperature)
    require(0 <= label_smoothing < 1, op, "label_smoothing", "a value in [0, 1)", label_smoothing)
    require(label_smoothing == 0 or objective == "nll", op, "label_smoothing", f"0 for {objective!r}", label_smoothing)
    require(math.isfinite(z_loss), op, "z_loss", "a finite number", z_loss)
    require(max_kept is None or max_kept >= 0, op, "max_kept", "a number of tokens, or None", max_kept)
    numbers = (float(softcap), float(temperature), float(label_smoothing), float(z_loss))
    return Options(objective, arguments, *numbers, bool(lean), max_kept)


def check_objective(
    op: str,
    options: Options,
    targets: Tensor,
    ref_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: list[Tensor],
    hidden: Tensor,
    weight: Tensor,
) -> None:
    """Each objective gets what it needs and nothing that it would ignore."""
    name, needs = options.objective, objectives.OBJECTIVES[options.objective].needs
    sequences = objectives.scope(name, options.arguments) != "row"
    given = {"ref_logprobs": ref_logprobs is not None, "cu_seqlens": cu_seqlens is not None, "reference": bool(heads)}
    wanted = {"ref_logprobs": needs == "ref_logprobs", "cu_seqlens": sequences, "reference": needs == "reference"}
    for key in given:
        expected = f"{'a value' if wanted[key] else 'None'} for {name!r}"
        require(given[key] == wanted[key], op, key, expected, "a value" if given[key] else "None")
    if ref_logprobs is not None:
        check_per_token(op, "ref_logprobs", ref_logprobs, targets)
    if cu_seqlens is not None:
        ok = cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0 and cu_seqlens.dtype == torch.int32
        require(ok, op, "cu_seqlens", "int32 [B + 1]", f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if heads:
        ref_hidden, ref_weight = heads
        ok = ref_hidden.dim() == 2 and ref_hidden.shape[0] == targets.numel() and ref_hidden.dtype == hidden.dtype
        got = f"{ref_hidden.dtype} {list(ref_hidden.shape)}"
        require(ok, op, "reference[0]", f"{hidden.dtype} [{targets.numel()}, H']", got)
        shape = (weight.shape[0], ref_hidden.shape[1])
        ok = ref_weight.shape == shape and ref_weight.dtype == hidden.dtype
        got = f"{ref_weight.dtype} {list(ref_weight.shape)}"
        require(ok, op, "reference[1]", f"{hidden.dtype} {list(shape)}", got)


def check_reduction(
    op: str,
    options: Options,
    reduction: str,
    normalizer: float | Tensor | None,
    accumulate_into: Tensor | None,
    weight: Tensor,
) -> None:
    require(reduction in ("mean", "sum", "none"), op, "reduction", "'mean', 'sum' or 'none'", repr(reduction))
    require(normalizer is None or reduction == "mean", op, "normalizer", "reduction='mean' with it", repr(reduction))
    if accumulate_into is not None:
        ok = accumulate_into.shape == weight.shape and accumulate_into.dtype == torch.float32
        ok = ok and accumulate_into.is_contiguous()
        got = f"{accumulate_into.dtype} {list(accumulate_into.shape)}"
        require(ok, op, "accumulate_into", f"contiguous float32 {list(weight.shape)}", got)
        require(reduction != "none", op, "accumulate_into", "reduction 'mean' or 'sum' with it", repr(reduction))
    if options.objective == "f_divergence" and objectives.scope("f_divergence", options.arguments) == "sequence":
        require(reduction != "none", op, "reduction", "'mean' or 'sum' for one loss per sequence", "'none'")
