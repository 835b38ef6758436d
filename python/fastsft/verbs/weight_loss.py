"""What packing a model's weights does to its loss: held-out samples scored by the engine, format by format."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsft.data.store import SampleStore
from fastsft.engine.llm import LLM
from fastsft.engine.options import QUANTIZATIONS
from fastsft.progress import Progress

FORMATS = ("float32", "bfloat16", *QUANTIZATIONS)
_SAMPLES = 256  # scored by one call


def losses_by_format(
    model: Path, store: SampleStore, formats: Sequence[str], *, group_size: int, capacity: int, tell: Progress
) -> dict[str, float]:
    """Weighted mean loss with the weights in each format, which packing rounds them to.

    Args:
        model: folder with config.json, weights and tokenizer.
        store: samples, with at least one target.
        formats: of ``FORMATS``. Activations are bfloat16 beside all but float32, as in generation.
        group_size: as for ``LLM``.
        capacity: as for ``evaluate_loss``.
    """
    batch = store.batch(np.arange(len(store)))
    bounds = batch.cu_seqlens.tolist()
    texts = [batch.ids[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    # Nothing is drawn after a document's last token.
    weights = torch.cat([batch.weights[a : b - 1] for a, b in itertools.pairwise(bounds)]).double()
    results: dict[str, float] = {}
    for format in formats:
        dtype = torch.float32 if format == "float32" else torch.bfloat16
        quantization = format if format in QUANTIZATIONS else None
        longest = max(map(len, texts))
        blocks = -(-(capacity + longest) // 16) + 1
        llm = LLM(model, dtype=dtype, quantization=quantization, group_size=group_size, num_blocks=blocks)
        scores: list[float] = []
        for begin in range(0, len(texts), _SAMPLES):
            prompts: list[dict[str, Any]] = [{"prompt_token_ids": ids} for ids in texts[begin : begin + _SAMPLES]]
            scores += [score for each in llm.score(prompts) for score in each]
            tell(f"loss in {format}", min(begin + _SAMPLES, len(texts)), len(texts))
        results[format] = -float((torch.tensor(scores, dtype=torch.float64) * weights).sum() / weights.sum())
    return results
