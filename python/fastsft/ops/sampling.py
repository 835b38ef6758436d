"""Drawing one token per row of logits, reproducibly: the noise is keyed by (seed, position)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastsft import _C
from fastsft.ops import _library

_SORTED = 1 << 23  # logits whose filters are applied at a time on a GPU: they are sorted, in about 50 bytes each


def _native(logits: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = _fake(logits)
    _C.sample(*(x.contiguous() for x in (logits, *parameters, *outputs)))
    return outputs


def _fake(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.new_empty(logits.shape[0], dtype=torch.int64), logits.new_empty(logits.shape[0])


def _on_device(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not logits.shape[0]:
        return _fake(logits)
    z = logits - logits.amax(1, keepdim=True)
    scores = z / torch.where(temperature > 0, temperature, 1)[:, None]
    # Greedy rows keep their best token whatever the filters say.
    filtered = ((temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))).nonzero().flatten()
    step = max(1, _SORTED // scores.shape[1])
    for rows in (filtered[begin : begin + step] for begin in range(0, len(filtered), step)):
        kept = kept_of(scores[rows], top_k[rows], top_p[rows], min_p[rows])
        scores[rows] = scores[rows].masked_fill(~kept, -torch.inf)
    ids: torch.Tensor = _best["cuda"](scores, temperature, seeds, positions)
    logprobs = z.gather(1, ids[:, None])[:, 0] - z.logsumexp(1)
    wrong = (~logprobs.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"sample: logits: row {wrong[0]}: expected numbers below infinity, one of them above -infinity"
        )
    return ids, logprobs


def kept_of(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """bool [B, V]: which tokens may be drawn; ``scores`` are logits over the temperature, the greatest of a row 0."""
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    last = torch.where(top_k > 0, top_k, scores.shape[1]).clamp(max=scores.shape[1]).long() - 1
    kept = ranked >= ranked.gather(1, last[:, None])
    share = torch.softmax(ranked.double().masked_fill(~kept, -torch.inf), 1).cumsum(1)
    before = torch.nn.functional.pad(share[:, :-1], (1, 0), value=-1.0)
    kept &= (top_p[:, None] >= 1) | (before < top_p[:, None])
    kept &= ranked.exp() >= min_p[:, None]
    return torch.empty_like(kept).scatter_(1, order, kept)


def best_tokens(
    scores: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """int64 [B]: argmax of a row plus, where its temperature is above 0, its noise; without Triton."""
    noise = gumbel_noise(seeds, positions, scores.shape[1]).to(scores.dtype)
    return (scores + noise.masked_fill((temperature == 0)[:, None], 0)).argmax(1)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, count: int) -> torch.Tensor:
    """float64 [B, count]: the noise of tokens 0 .. count - 1 at each position (see ``sampling.h``)."""
    low = 0xFFFFFFFF
    c0 = torch.arange(count, device=seeds.device).expand(len(seeds), -1)
    c1 = torch.zeros_like(c0)
    c2, c3 = ((x & low)[:, None].expand_as(c0) for x in (positions, positions >> 32))
    k0, k1 = ((x & low)[:, None] for x in (seeds, seeds >> 32))
    for _ in range(10):  # Philox4x32-10; a product of two words fills int64, sign included
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32 & low) ^ c1 ^ k0, p1 & low, (p0 >> 32 & low) ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    w = (((c0 >> 1).float() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-w.double()))


def _moved(parameters: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """On a device; from the CPU in one copy, which nothing waits for: a step of decoding is short."""
    if device.type == "cpu" or not all(x.is_cpu for x in parameters):
        return [x.to(device) for x in parameters]
    parts = [x.contiguous().view(torch.uint8) for x in parameters]  # four of 4 bytes a row, then those of 8: aligned
    packed = torch.cat(parts)
    packed = (packed.pin_memory() if device.type == "cuda" else packed).to(device, non_blocking=True)
    moved = packed.split_with_sizes([len(part) for part in parts])
    return [bytes_.view(x.dtype) for bytes_, x in zip(moved, parameters, strict=True)]


_best = _library.triton_or(best_tokens, "sampling", "best_tokens")
_op = _library.define(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, "
    "Tensor positions) -> (Tensor, Tensor)",
    fake=_fake,
    cpu=_native,
    cuda=_on_device,
    cuda_is=_best["cuda_is"],
)


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
    """Draws one token per row: argmax over the kept tokens of ``logits / temperature`` + Gumbel noise.

    The noise of token v is a function of (seed, position, v), by Philox, so a draw depends on its own row, parameters,
    seed and position only: not on the batch, the number of threads or the instruction set. The filters apply in the
    order top-k, top-p, min-p, each to what the one before left, as in ``transformers``; the exact rules are in
    ``sampling.h``.

    Args:
        logits: float32 [B, V]; -inf forbids a token.
        temperature: float32 [B], >= 0; 0 takes the most likely token, the lowest index on ties.
        top_k: int32 [B]; 0 is off; tokens that tie with the k-th stay.
        top_p: float32 [B], in (0, 1]; 1 is off.
        min_p: float32 [B], in [0, 1]; 0 is off.
        seeds: int64 [B]. Parameters may be on the CPU whatever the logits are on.
        positions: int64 [B], e.g. the position in the sequence of the token drawn.

    Returns:
        ids int64 [B], and float32 [B]: the log-softmax of the raw logits at these ids. On a GPU the noise has the same
        random numbers and logarithms of other last bits: the draws are those of the CPU but for near ties.

    Raises:
        ValueError: wrong dtype, shape or range, a NaN or +inf logit, a row of -inf (the message names the row).
    """
    parameters = _moved([temperature, top_k, top_p, min_p, seeds, positions], logits.device)
    return _op(logits, *parameters)  # type: ignore[no-any-return]


def sample_few(
    logits: torch.Tensor, rows: Sequence[tuple[float, int, float, float, int, int]]
) -> tuple[list[int], list[float]]:
    """:func:`sample` on the CPU with numbers instead of tensors, which take longer to make than a row to draw.

    Args:
        logits: as there.
        rows: of each: temperature, top_k, top_p, min_p, seed, position.
    """
    return _C.sample_few(logits.contiguous(), rows)
