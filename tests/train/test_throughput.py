"""The arithmetic of a step against what torch counts when it runs one, pair by pair where torch cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_cases import collated, model_of

from fastsft.models.decoder import Decoder
from fastsft.models.lora import LoraConfig, add_lora
from fastsft.train.throughput import Arithmetic, _pairs, matmul_rate


def test_matrices_are_counted_as_torch_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With attention left out: the layers' matrices, and a head over all rows."""
    monkeypatch.setattr("fastsft.models.layers.linear", torch.nn.functional.linear)
    model = model_of()
    batch = collated(9, 3)
    with FlopCounterMode(display=False) as counter:
        hidden = model(batch.ids, batch.position_ids, lambda layer, q, k, v, window: q + (k + v).sum())
        torch.nn.functional.linear(hidden, model.lm_head_weight).sum().backward()
    lengths = np.array([1] * batch.num_tokens)
    ours = Arithmetic.of(model)
    pairs = sum(per_pair for per_pair, _ in ours.per_pair) * batch.num_tokens
    assert ours.flops(lengths, batch.num_tokens) - pairs == counter.get_total_flops()


def test_frozen_matrices_need_no_gradient_of_theirs() -> None:
    model = model_of()
    full = Arithmetic.of(model)
    add_lora(model, LoraConfig(4, 8.0, ("q_proj", "down_proj")), seed=0)
    adapters = sum(p.numel() for p in model.layers.parameters() if p.requires_grad)
    adapted = Arithmetic.of(model)
    assert adapted.per_token == full.per_token // 6 * 4 + 6 * adapters
    assert adapted.per_target == full.per_target // 6 * 4


@pytest.mark.parametrize("window", [None, 0, 3, 500])
def test_pairs(window: int | None) -> None:
    lengths = np.array([0, 1, 3, 4, 5, 77])
    mask = sum(
        sum(1 for q in range(n) for k in range(n) if k <= q and (window is None or q - k <= window)) for n in lengths
    )
    assert _pairs(lengths, window) == mask


def test_a_batch_counts_its_documents_and_its_targets() -> None:
    model: Decoder = model_of()
    batch = collated(9, 3)
    ours = Arithmetic.of(model)
    lengths = batch.cu_seqlens.diff().numpy()
    targets = int((batch.weights != 0).sum())
    assert ours.flops_of([batch, batch]) == 2 * ours.flops(lengths, targets)
    pairs = sum(n * (n + 1) // 2 for n in lengths.tolist())
    config = model.config
    attention = 12 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * pairs
    assert ours.flops(lengths, 0) == ours.per_token * batch.num_tokens + attention


def test_the_rate_is_that_of_a_matrix_product() -> None:
    rate = matmul_rate(torch.float32, 0.02)
    assert 1e8 < rate < 1e15
    assert matmul_rate(torch.float32, 0.02) == rate  # measured once
