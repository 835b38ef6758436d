"""The draw of the next tokens, which every path shares: plain, speculative and prompt rows.

Shape suffixes: R rows of the step, V vocabulary.
"""

from __future__ import annotations

import torch

from fastsft import ops
from fastsft.engine.sequence import Sequence


def draw(
    sequences: list[Sequence], logits_RV: torch.Tensor, end_ids: tuple[int, ...], drafts: list[list[int]]
) -> list[int]:
    """Draw tokens for each sequence and append those that hold.

    A sequence with k drafts has k + 1 rows: the logits after its tokens, and after each draft. The draws hold up to the
    first that differs from the draft in its place, that one included.

    The noise of token t of a request is a function of its seed and t alone: neither the batch nor a preemption nor a
    draft changes it. (The logits' last bits may depend on the number of rows, so that a draw on the very edge can fall
    otherwise.)

    Returns:
        How many drafts of each sequence were right.
    """
    each = [(s, j) for s, draft in zip(sequences, drafts, strict=True) for j in range(len(draft) + 1)]
    allowed_RV = logits_RV
    for row, (sequence, j) in enumerate(each):
        barred = [] if sequence.params.ignore_eos else [*end_ids]
        barred += sequence.params.stop_token_ids
        if sequence.generated + j < sequence.params.min_tokens and barred:
            if allowed_RV is logits_RV:
                allowed_RV = logits_RV.clone()
            allowed_RV[row, barred] = -torch.inf
    params = [s.params for s, _ in each]
    ids, _ = ops.sample(
        allowed_RV,
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32),
        top_k=torch.tensor([p.top_k for p in params], dtype=torch.int32),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32),
        seeds=torch.tensor([s.seed for s, _ in each], dtype=torch.int64),
        positions=torch.tensor([s.generated + j for s, j in each], dtype=torch.int64),
    )
    drawn, row, right = ids.tolist(), 0, []
    for sequence, draft in zip(sequences, drafts, strict=True):
        for j, guess in enumerate([*draft, None]):
            token, wanted = drawn[row + j], sequence.params.logprobs
            if wanted is not None:
                logprobs_V = torch.log_softmax(logits_RV[row + j], -1)
                shown = [token, *logprobs_V.topk(min(wanted, len(logprobs_V))).indices.tolist()]
                sequence.logprobs.append({i: float(logprobs_V[i]) for i in shown})
            sequence.append(token, end_ids)
            if token != guess:
                right.append(j)
                break
            if sequence.finish_reason is not None:
                right.append(j + 1)
                break
        row += len(draft) + 1
    return right
