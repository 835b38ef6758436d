"""The draw of the next tokens, which every path shares: plain, speculative and prompt rows.

Shape suffixes: R rows of the step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from itertools import accumulate

import torch

from fastsft import ops
from fastsft.engine.rejection import settle
from fastsft.engine.sequence import Sequence
from fastsft.ops.sampling import sample_few


def draw(
    sequences: Ordered[Sequence],
    logits_RV: torch.Tensor,
    end_ids: tuple[int, ...],
    paths: Ordered[Ordered[Ordered[int]]],
) -> list[tuple[int, int]]:
    """Draw tokens for each sequence and append those that hold.

    A sequence has one or more paths of drafts, one after the other; a path of k drafts has k + 1 consecutive rows: the
    logits after the sequence's tokens, and after each draft. Each row is drawn as if its draft were part of the text;
    the draws of the path that holds the longest hold up to the first that differs from the draft in its place, that one
    included. So the text is what plain decoding draws, whatever the drafts. Where the distributions that the drafts
    were drawn from came with them, rejection sampling takes the place of the draws beside them: then the text follows
    the distribution of plain decoding.

    The noise of token t of a request is a function of its seed and t alone: neither the batch nor a preemption nor a
    draft changes it.

    Args:
        logits_RV: float32; rows of sequences with processors are changed.
        paths: for each sequence; one path where distributions came with the drafts.

    Returns:
        For each sequence, which path held the longest, the first of several, and how many drafts of it were right.
    """
    if not logits_RV.is_cpu and any(s.processors or s.draft_probs_KV is not None for s in sequences):
        logits_RV = logits_RV.cpu()  # where those work
    drafts = [draft for mine in paths for draft in mine]
    owners = [s for s, mine in zip(sequences, paths, strict=True) for _ in mine]
    starts = list(accumulate([1 + len(draft) for draft in drafts], initial=0))[:-1]
    raw: dict[int, torch.Tensor] = {}  # what a row was before its processors
    empty: set[int] = set()
    for sequence, draft, start in zip(owners, drafts, starts, strict=True):
        if sequence.processors is not None:
            mine_KV = logits_RV[start : start + len(draft) + 1]
            raw.update(enumerate(mine_KV.clone(), start))
            sequence.processors.apply(mine_KV, sequence.tokens, draft)
            if sequence.processors.bars:
                for row in (mine_KV.amax(-1) == -torch.inf).nonzero().flatten().tolist():
                    empty.add(start + row)
                    mine_KV[row] = 0
    ids, logprobs = _sample(owners, drafts, logits_RV)
    for sequence, draft, start in zip(owners, drafts, starts, strict=True):
        if draft and (q_KV := sequence.draft_probs_KV) is not None:
            logits_KV = logits_RV[start : start + len(draft)]
            settled = settle(draft, q_KV[: len(draft)], logits_KV, sequence.params, sequence.seed, sequence.generated)
            ids[start : start + len(settled)] = settled
            raw = dict(enumerate(logits_KV, start)) | raw  # their log-probabilities are not those of the draws
        sequence.draft_probs_KV = None
    held, first = [], 0
    for sequence, mine in zip(sequences, paths, strict=True):
        best = _longest(mine, starts[first : first + len(mine)], ids) if len(mine) > 1 else 0
        draft, start = mine[best], starts[first + best]
        first += len(mine)
        right = 0
        for row in range(start, start + len(draft) + 1):
            if row in empty:
                sequence.finish_reason, sequence.stop_reason = "error", "no token is allowed"
                break
            token = ids[row]
            if sequence.params.logprobs is not None:
                before_V = raw[row] if row in raw else logits_RV[row]
                sequence.logprobs.append(report(before_V, token, sequence.params.logprobs))
            sequence.cumulative_logprob += (
                logprobs[row] if row not in raw else float(raw[row][token] - raw[row].logsumexp(-1))
            )
            sequence.append(token, end_ids)
            right += row - start < len(draft) and token == draft[row - start]
            if sequence.finish_reason is not None or right <= row - start:
                break
        held.append((best, right))
    return held


def _longest(paths: Ordered[Ordered[int]], starts: Ordered[int], ids: Ordered[int]) -> int:
    """Which of the paths, whose rows begin at ``starts``, has the most drafts that are what was drawn in their places;
    the first of several."""

    def agreeing(p: int) -> int:
        return next((j for j, token in enumerate(paths[p]) if ids[starts[p] + j] != token), len(paths[p]))

    return max(range(len(paths)), key=agreeing)


def report(logits_V: torch.Tensor, token: int, count: int) -> dict[int, float]:
    """Log-probabilities of ``token`` and of the ``count`` most probable tokens, under the whole softmax."""
    logprobs_V = torch.log_softmax(logits_V, -1)
    top = logprobs_V.topk(min(count, len(logprobs_V)))
    return {token: float(logprobs_V[token]), **dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))}


def score(sequence: Sequence, logits_KV: torch.Tensor, begin: int) -> None:
    """Take the log-probabilities of the prompt from the logits after its tokens ``begin`` to ``begin + K``."""
    known, count = len(sequence.prompt_logprobs), sequence.params.prompt_logprobs or 0
    scored = sequence.tokens[known : min(begin + 1 + len(logits_KV), sequence.prompt_len)]
    logprobs_KV = torch.log_softmax(logits_KV[known - begin - 1 :][: len(scored)], -1)
    top_KN = logprobs_KV.topk(min(count, logprobs_KV.shape[-1]))
    scored_K1 = torch.tensor(scored, dtype=torch.int64, device=logprobs_KV.device)[:, None]
    own = logprobs_KV.gather(1, scored_K1).flatten().tolist()
    for token, logprob, ids, values in zip(scored, own, top_KN.indices.tolist(), top_KN.values.tolist(), strict=True):
        sequence.prompt_logprobs.append({token: logprob, **dict(zip(ids, values, strict=True))})


def _sample(
    sequences: Ordered[Sequence], drafts: Ordered[Ordered[int]], logits_RV: torch.Tensor
) -> tuple[list[int], list[float]]:
    each = [s for s, draft in zip(sequences, drafts, strict=True) for _ in range(len(draft) + 1)]
    places = [s.generated + j for s, draft in zip(sequences, drafts, strict=True) for j in range(len(draft) + 1)]
    return draw_rows(logits_RV, each, places)


def draw_rows(
    logits_RV: torch.Tensor, sequences: Ordered[Sequence], places: Ordered[int]
) -> tuple[list[int], list[float]]:
    """A token for each row, with its sequence's parameters and the noise of its place among the generated tokens, and
    its log-probability."""
    if logits_RV.is_cpu:
        pairs = zip(sequences, places, strict=True)
        rows = [(p.temperature, p.top_k, p.top_p, p.min_p, s.seed, at) for s, at in pairs for p in (s.params,)]
        return sample_few(logits_RV, rows)
    ids, logprobs = ops.sample(
        logits_RV,
        temperature=torch.tensor([s.params.temperature for s in sequences], dtype=torch.float32),
        top_k=torch.tensor([s.params.top_k for s in sequences], dtype=torch.int32),
        top_p=torch.tensor([s.params.top_p for s in sequences], dtype=torch.float32),
        min_p=torch.tensor([s.params.min_p for s in sequences], dtype=torch.float32),
        seeds=torch.tensor([s.seed for s in sequences], dtype=torch.int64),
        positions=torch.tensor(places, dtype=torch.int64),
    )
    return ids.tolist(), logprobs.tolist()
