"""The draw of the next token, which every path shares: plain, speculative and prompt rows."""

from __future__ import annotations

import torch

from fastsft import ops
from fastsft.engine.sequence import Sequence


def draw(sequences: list[Sequence], logits_BV: torch.Tensor, end_ids: tuple[int, ...]) -> None:
    """Draw one token for each sequence and append it.

    The noise of token t of a request is a function of its seed and t alone: neither the batch nor a preemption changes
    it. (The logits' last bits may depend on the number of rows, so that a draw on the very edge can fall otherwise.)
    """
    allowed_BV = logits_BV
    for row, sequence in enumerate(sequences):
        barred = [] if sequence.params.ignore_eos else [*end_ids]
        barred += sequence.params.stop_token_ids
        if sequence.generated < sequence.params.min_tokens and barred:
            if allowed_BV is logits_BV:
                allowed_BV = logits_BV.clone()
            allowed_BV[row, barred] = -torch.inf
    params = [s.params for s in sequences]
    ids, _ = ops.sample(
        allowed_BV,
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32),
        top_k=torch.tensor([p.top_k for p in params], dtype=torch.int32),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32),
        seeds=torch.tensor([s.seed for s in sequences], dtype=torch.int64),
        positions=torch.tensor([s.generated for s in sequences], dtype=torch.int64),
    )
    for row, (sequence, token) in enumerate(zip(sequences, ids.tolist(), strict=True)):
        wanted = sequence.params.logprobs
        if wanted is not None:
            logprobs_V = torch.log_softmax(logits_BV[row], -1)
            shown = [token, *logprobs_V.topk(min(wanted, len(logprobs_V))).indices.tolist()]
            sequence.logprobs.append({i: float(logprobs_V[i]) for i in shown})
        sequence.append(token, end_ids)
