"""The specification of every op in plain torch and numpy: obvious, slow, differentiable by autograd.

The tests hold the kernels against these functions in float64; the benches use them as one baseline.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# --- attention ------------------------------------------------------------------------------------------------------


def visible(len_q: int, len_k: int, causal: bool, window: tuple[int, int] | None, device: torch.device) -> torch.Tensor:
    """Which keys each query of one sequence sees: bool [len_q, len_k].

    Query i stands at key position ``i + len_k - len_q`` (bottom-right alignment). ``window = (left, right)`` keeps keys
    from ``left`` before to ``right`` after that position; -1 means unbounded.
    """
    position = torch.arange(len_q, device=device)[:, None] + (len_k - len_q)
    key = torch.arange(len_k, device=device)[None, :]
    mask = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
    if causal:
        mask &= key <= position
    if window is not None:
        left, right = window
        if left >= 0:
            mask &= key >= position - left
        if right >= 0:
            mask &= key <= position + right
    return mask


def attention_one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool,
    scale: float | None,
    window: tuple[int, int] | None,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: q [Tq, Hq, D], k and v [Tk, Hkv, D] -> out [Tq, Hq, D], lse [Hq, Tq]; no key, no output (0)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    mask = visible(q.shape[0], k.shape[0], causal, window, q.device)
    scores = scores.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    probability = torch.where(mask, torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None]), 0.0)
    return torch.einsum("hqk,khd->qhd", probability, v), lse


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention within each packed sequence, one at a time -> (out like q, lse [Hq, Tq])."""
    bounds_q = cu_seqlens_q.tolist()
    bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    outs, lses = [torch.zeros_like(q[:0])], [q.new_zeros(q.shape[1], 0)]
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        out, lse = attention_one(
            q[q0:q1], k[k0:k1], v[k0:k1], causal=causal, scale=scale, window=window, softcap=softcap
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Gather each sequence's keys and values from its blocks, then attend as in :func:`varlen_attention`."""
    block_size = k_cache.shape[1]
    bounds = cu_seqlens_q.tolist()
    outs = [torch.zeros_like(q[:0])]
    for b, (q0, q1) in enumerate(itertools.pairwise(bounds)):
        length = int(context_lens[b])
        blocks = block_table[b, : -(-length // block_size)].long()
        k = k_cache[blocks].flatten(0, 1)[:length]
        v = v_cache[blocks].flatten(0, 1)[:length]
        outs.append(attention_one(q[q0:q1], k, v, causal=causal, scale=scale, window=window, softcap=softcap)[0])
    return torch.cat(outs)


# --- linear layers --------------------------------------------------------------------------------------------------


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N]."""
    out = x @ weight.T
    return out if bias is None else out + bias


def pack_weight(weight: torch.Tensor, format: str, *, group: int = 32) -> torch.Tensor:
    """The weight [N, K] that a packed one stands for, in float32."""
    if format in ("float32", "bfloat16"):
        return weight.to(getattr(torch, format)).float()
    w = weight.float()
    if format == "int8":
        scale = w.abs().amax(1, keepdim=True) / 127
        return (w / scale).round().clamp(-127, 127).nan_to_num(0.0) * scale
    columns = []
    for part in torch.split(w, group, dim=1):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        extreme = torch.where(high > -low, high, low)
        scale = (extreme / -8).bfloat16().float()  # as it is stored: the values are rounded on it
        columns.append((part / scale).round().clamp(-8, 7).nan_to_num(0.0) * scale)
    return torch.cat(columns, 1)


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], what ``pack_weight`` gave [N, K], bias [N] -> [..., N]."""
    return linear(x, packed.to(x.dtype), bias)


# --- loss -----------------------------------------------------------------------------------------------------------


def objective_loss(
    objective: str,
    args: dict[str, Any],
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    ref: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    sequences: Sequence[Sequence[int]] = (),
    vocab: int = 0,
) -> torch.Tensor:
    """psi per token as docs/ops.md writes it, sg(.) as detach; ``sequences``: the tokens of each, in order."""
    p = logprob.exp()
    if objective == "nll":
        return -logprob
    if objective == "dft":
        return -p.detach() * logprob
    if objective == "power":
        return (1 - p ** float(args["alpha"])) / float(args["alpha"])
    if objective == "threshold":
        return -(p >= float(args["tau"])).to(p.dtype) * logprob
    if objective == "focal":
        return -((1 - p) ** float(args["gamma"])).detach() * logprob
    if objective == "entropy_gate":
        gate = entropy / math.log(vocab) if args["form"] == "normalized" else torch.exp(-entropy)
        return -gate.detach() * logprob
    if ref is None or weights is None:
        raise ValueError(f"{objective}: needs ref and weights")
    ratio = torch.exp(logprob - ref)
    if objective == "ratio_clip":
        e = float(args["epsilon"])
        return -torch.minimum(ratio, ratio.clamp(1 - e, 1 + e))
    if objective == "hpt":
        e = float(args["epsilon"])
        return -torch.minimum(ratio * weights, ratio.clamp(1 - e, 1 + e) * weights) / weights
    if objective == "k3":
        return -logprob + float(args["beta"]) * (1 / ratio - (ref - logprob) - 1)
    if objective == "f_divergence":
        return _f_divergence(args, logprob - ref, weights, sequences)
    gain = torch.ones_like(logprob)
    for tokens in sequences:
        gain[list(tokens)] = _importance(objective, args, (logprob - ref).detach()[list(tokens)])
    return -gain * logprob


def _importance(objective: str, args: dict[str, Any], u: torch.Tensor) -> torch.Tensor:
    """The weights of one sequence's tokens from its log-ratios, one token after the other."""
    n = len(u)
    if objective == "iw_sequence":
        return u.sum().exp().clamp(float(args["low"]), float(args["high"])).expand(n)
    delta = u.clamp(float(args["delta_min"]), float(args["delta_max"]))
    block = {"pear_token": 1, "pear_block": int(args.get("block", 1)), "pear_sequence": n}[objective]
    logs = []
    for t in range(n):
        last = min((t // block + 1) * block, n)  # the first token behind the token's block
        if objective == "pear_sequence":
            logs.append(delta.sum())
        else:
            logs.append(math.log(float(args["gamma"])) * (n - last) + delta[last:].sum())
    return torch.stack(logs).clamp(float(args["log_min"]), float(args["log_max"])).exp()


def _f_divergence(
    args: dict[str, Any], u: torch.Tensor, weights: torch.Tensor, sequences: Sequence[Sequence[int]]
) -> torch.Tensor:
    """-(f'(rho) - f'(1)) / f''(1) of rho = exp(u), or of a sequence's exp(sum of weight u)."""

    def term(rho: torch.Tensor) -> torch.Tensor:
        psi = {
            "kl": lambda: -torch.log(rho),  # f = x log x: f' = log x + 1, f''(1) = 1
            "pearson": lambda: -(2 * (rho - 1)) / 2,  # f = (x - 1)^2: f' = 2 (x - 1), f''(1) = 2
            "hellinger": lambda: -(1 - rho**-0.5) / 0.5,  # f = (sqrt(x) - 1)^2: f' = 1 - x^(-1/2), f''(1) = 1/2
        }
        return psi[args["f"]]()

    if args["level"] == "token":
        return term(u.exp())
    psi = torch.zeros_like(u)
    for tokens in sequences:
        which = list(tokens)
        psi[which] = term((weights[which] * u[which]).sum().exp()) / (len(which) * weights[which])
    return psi


def _log_softmax(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = hidden @ weight.T + (0 if bias is None else bias)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    return torch.log_softmax(logits, -1), torch.logsumexp(logits, -1)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor | None = None,
    *,
    objective: str = "nll",
    objective_args: dict[str, Any] | None = None,
    ref_logprobs: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    reference: tuple[torch.Tensor, torch.Tensor] | None = None,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | None = None,
    softcap: float = 0.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """All logits at once, then the formulas, differentiable by autograd. ``objective_args`` must be complete."""
    args = objective_args or {}
    kept = targets != ignore_index
    weights = kept.to(hidden.dtype) if token_weights is None else torch.where(kept, token_weights, 0).to(hidden.dtype)
    rows = weights != 0
    number = (rows.cumsum(0) - 1).tolist()  # of a token among those kept
    bounds = [] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = [[number[t] for t in range(a, b) if rows[t]] for a, b in itertools.pairwise(bounds)]
    hidden, targets, weights = hidden[rows], targets[rows], weights[rows]
    log_p, lse = _log_softmax(hidden, weight, bias, softcap, temperature)
    logprob = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    ref = None if ref_logprobs is None else ref_logprobs[rows]
    if objective == "asft" and reference is not None:
        log_q, _ = _log_softmax(reference[0][rows], reference[1], None, softcap, temperature)
        a, b = (log_q, log_p) if args["direction"] == "forward" else (log_p, log_q)
        loss = -logprob.exp().detach() * logprob + float(args["lam"]) * (a.exp() * (a - b)).sum(-1)
    else:
        filled = [tokens for tokens in sequences if tokens]
        loss = objective_loss(objective, args, logprob, entropy, ref, weights, filled, weight.shape[0])
    loss = loss + label_smoothing * (logprob - log_p.mean(-1)) + z_loss * lse.square()
    loss = loss * weights
    if reduction == "none":
        return loss.new_zeros(rows.shape).masked_scatter(rows, loss)
    if reduction == "sum":
        return loss.sum()
    divisor = float(weights.sum()) if normalizer is None else normalizer
    return loss.sum() / divisor if divisor else loss.sum() * 0


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy, [T] each; 0 at ignored targets."""
    kept = targets != ignore_index
    log_p, _ = _log_softmax(hidden, weight, bias, softcap, temperature)
    logprob = log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(kept, logprob, 0), torch.where(kept, -(log_p.exp() * log_p).sum(-1), 0)


def loss_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    reference: torch.Tensor | None,
    softcap: float,
    temperature: float,
    forward_divergence: bool,
    stats: torch.Tensor,
) -> None:
    """``loss_stats`` of fastsft/loss.h."""
    _, u = _capped(logits, bias, softcap, temperature)
    log_p = torch.log_softmax(u, -1)
    stats.zero_()
    stats[0] = log_p.gather(1, targets[:, None])[:, 0]
    stats[1] = -torch.xlogy(log_p.exp(), log_p.exp()).sum(-1)
    stats[2] = torch.logsumexp(u, -1)
    stats[3] = log_p.mean(-1)
    if reference is not None:
        v = _capped(reference, None, softcap, temperature)[1]
        log_q = torch.log_softmax(v, -1)
        a, b = (log_q, log_p) if forward_divergence else (log_p, log_q)
        stats[4] = torch.where(a.exp() == 0, 0, a.exp() * (a - b)).sum(-1)
        stats[5] = torch.logsumexp(v, -1)


def loss_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    reference: torch.Tensor | None,
    softcap: float,
    temperature: float,
    stats: torch.Tensor,
    coefficients: torch.Tensor,
) -> None:
    """``loss_gradient`` of fastsft/loss.h, over ``logits``."""
    slope, u = _capped(logits, bias, softcap, temperature)
    log_p = u - stats[2][:, None]
    p = log_p.exp()
    on_p, on_target, uniform, on_plogp, on_plogq, on_q = coefficients[:, :, None]
    gradient = on_p * p + uniform + on_plogp * torch.where(p == 0, 0, p * log_p)
    if reference is not None:
        log_q = _capped(reference, None, softcap, temperature)[1] - stats[5][:, None]
        gradient += on_plogq * torch.where(p == 0, 0, p * log_q) + on_q * log_q.exp()
    gradient.scatter_add_(1, targets[:, None], on_target)
    logits.copy_(gradient * slope)


def _capped(
    logits: torch.Tensor, bias: torch.Tensor | None, softcap: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slope and the value of softcap tanh((logits + bias) / softcap) / temperature."""
    z = logits.float() + (0 if bias is None else bias.float())
    if softcap <= 0:
        return torch.full_like(z, 1 / temperature), z / temperature
    t = torch.tanh(z / softcap)
    return (1 - t * t) / temperature, softcap * t / temperature


# --- the rest of a decoder layer ------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Rounded to x's type before the weight is applied."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x cos + rotate_half(x) sin, with each angle used twice."""
    a, b = x.chunk(2, -1)
    return x * torch.cat([cos, cos], -1)[:, None] + torch.cat([-b, a], -1) * torch.cat([sin, sin], -1)[:, None]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


# --- fill in the middle ---------------------------------------------------------------------------------------------


def philox(seed: int, stream: int, index: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (index, stream), low words first."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = index & low, index >> 32 & low, stream & low, stream >> 32 & low
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def fim_permute(
    tokens: Sequence[int],
    cu_seqlens: Sequence[int],
    *,
    sentinels: tuple[int, int, int],
    seed: int,
    rate: float = 0.5,
    spm_rate: float = 0.5,
    spans: Sequence[tuple[int, int]] | None = None,
    max_len: int | None = None,
    doc_ids: Sequence[int] | None = None,
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Lists in, lists out: (tokens, cu_seqlens, source_index, mode)."""
    prefix, suffix, middle = (-1 - s for s in sentinels)  # negative marks in the source index until the end
    source: list[int] = []
    bounds, modes = [0], []
    for b, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
        length = end - begin
        x = philox(seed, b if doc_ids is None else doc_ids[b], 0x46494D << 32)
        cuts = sorted(bits * (length + 1) >> 32 for bits in x[2:]) if spans is None else spans[b]
        m0, m1 = begin + cuts[0], begin + cuts[1]
        p, m, s = list(range(begin, m0)), list(range(m0, m1)), list(range(m1, end))
        mode = 0
        if length > 0 and (max_len is None or length + 3 <= max_len) and x[0] < round(rate * 2**32):
            mode = 2 if x[1] < round(spm_rate * 2**32) else 1
        source += [p + m + s, [prefix, *p, suffix, *s, middle, *m], [prefix, suffix, *s, middle, *p, *m]][mode]
        bounds.append(len(source))
        modes.append(mode)
    out = [int(tokens[i]) if i >= 0 else -1 - i for i in source]
    return out, bounds, [max(i, -1) for i in source], modes


# --- MinHash --------------------------------------------------------------------------------------------------------


def text_units(text: str, unit: str) -> list[bytes]:
    """The words, or the characters, of a text (see ``minhash.h``)."""
    lowered = text.encode().lower()  # bytes.lower touches ASCII only
    if unit == "word":
        return re.findall(rb"[a-z0-9_\x80-\xff]+", lowered)
    return [c.encode() for c in re.sub(rb"[ \t-\r]+", b" ", lowered).strip(b" ").decode()]


def shingles(text: str, ngram: int, unit: str) -> set[tuple[bytes, ...]]:
    """The set whose Jaccard similarity the signatures estimate."""
    units = text_units(text, unit)
    width = min(ngram, len(units))
    return {tuple(units[i : i + width]) for i in range(len(units) - width + 1)} if units else set()


def fmix32(h: int) -> int:
    h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ h >> 16


def unit_hash(unit: bytes, kind: str) -> int:
    low = 2**64 - 1
    if kind == "char":
        value = unit[0]
        for byte in unit[1:]:
            value = (value << 6 | byte & 0x3F) & 0xFFFFFFFF
        return fmix32(value)
    s = 0x9E3779B97F4A7C15 * len(unit) & low
    for at in range(0, len(unit), 16):
        block = unit[at : at + 16].ljust(16, b"\0")
        s = (s ^ int.from_bytes(block[:8], "little")) * 0xBF58476D1CE4E5B9 & low
        s ^= s >> 32
        s = (s ^ int.from_bytes(block[8:], "little")) * 0x94D049BB133111EB & low
        s ^= s >> 29
    return s >> 32


def minhash_signatures(
    texts: Sequence[str], *, num_perm: int = 128, ngram: int = 5, unit: str = "word", seed: int = 0
) -> npt.NDArray[np.uint32]:
    factors = np.array([philox(seed, 0x4D696E48617368, j)[:2] for j in range(num_perm)], np.uint64)
    a, b = factors[:, 0] | np.uint64(1), factors[:, 1]
    out = np.full((len(texts), num_perm), 0xFFFFFFFF, np.uint32)
    for row, text in zip(out, texts, strict=True):
        for shingle in shingles(text, ngram, unit):
            total = sum(unit_hash(u, unit) * pow(0x1B873593, k, 2**32) for k, u in enumerate(shingle, 1))
            h = np.uint64(fmix32(total & 0xFFFFFFFF))
            np.minimum(row, (a * h + b).astype(np.uint32), out=row)
    return out


def lsh_shape(num_perm: int, threshold: float) -> tuple[int, int]:
    """Integrals by the midpoint rule; the first best shape by ascending bands."""
    at = (np.arange(4000) + 0.5) / 4000
    best = (math.inf, 0, 0)
    for bands in range(1, num_perm + 1):
        for rows in range(1, num_perm // bands + 1):
            found = 1 - (1 - at**rows) ** bands
            error = float(np.where(at < threshold, found, 1 - found).mean()) / 2
            best = min(best, (error, bands, rows))
    return best[1], best[2]


def lsh_clusters(
    signatures: npt.NDArray[np.uint32], *, threshold: float = 0.7, bands: int | None = None, rows: int | None = None
) -> npt.NDArray[np.int64]:
    """All pairs, then connected components by repeated relabelling."""
    n, num_perm = signatures.shape
    if bands is None or rows is None:
        bands, rows = lsh_shape(num_perm, threshold)
    equal = signatures[:, None, :] == signatures[None, :, :]
    candidate = equal[:, :, : bands * rows].reshape(n, n, bands, rows).all(-1).any(-1)
    linked = (candidate & (equal.sum(-1) / num_perm >= threshold)) | np.eye(n, dtype=bool)
    labels = np.arange(n)
    for _ in range(n):
        labels = np.where(linked, labels[None, :], n).min(1, initial=n)
    return labels.astype(np.int64)


# --- packing --------------------------------------------------------------------------------------------------------


def pack_sequences(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the members of each bin, in the order in which they were placed."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(room[b], b) for b in range(len(bins)) if room[b] >= lengths[i]]
        if not fitting:
            bins.append([])
            room.append(capacity)
        b = min(fitting)[1] if fitting else len(bins) - 1
        bins[b].append(i)
        room[b] -= lengths[i]
    return bins


# --- sampling -------------------------------------------------------------------------------------------------------


def gumbel_noise(seed: int, position: int, count: int) -> torch.Tensor:
    """float64 [count]: the noise of tokens 0 .. count - 1 (see ``sampling.h``)."""
    bits = np.array([philox(seed, position, v)[0] for v in range(count)], np.uint32)
    w = np.minimum(((bits >> 1).astype(np.float32) + np.float32(0.5)) * np.float32(2**-31), np.float32(1 - 2**-24))
    return -torch.log(-torch.log1p(-torch.from_numpy(w.astype(np.float64))))


def kept_tokens(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """bool [V]: which tokens of one row, float [V], may be drawn at a temperature > 0."""
    z = (logits - logits.max()).double() / temperature
    kept = z > -math.inf
    if 0 < top_k < len(z):
        kept &= logits >= logits.topk(top_k).values[-1]
    if top_p < 1:
        order = torch.sort(z.masked_fill(~kept, -math.inf), descending=True, stable=True).indices
        share = torch.softmax(z.masked_fill(~kept, -math.inf)[order], 0).cumsum(0)
        kept[order[1:][share[:-1] >= top_p]] = False
    return kept & (z.exp() >= min_p)


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row after the other, in float64."""
    ids = logits.argmax(-1) if len(logits) else torch.empty(0, dtype=torch.int64)
    for r, row in enumerate(logits):
        if temperature[r] > 0:
            t = float(temperature[r])
            kept = kept_tokens(row, t, int(top_k[r]), float(top_p[r]), float(min_p[r]))
            scores = row.double() / t + gumbel_noise(int(seeds[r]), int(positions[r]), len(row))
            ids[r] = scores.masked_fill(~kept, -math.inf).argmax()
    return ids, torch.log_softmax(logits.double(), -1).gather(1, ids[:, None])[:, 0].float()
