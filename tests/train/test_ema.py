"""The averaged weights: the recurrence in float64, and a model that comes back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from train_cases import collated, model_of

from fastsft.config import OptimOptions
from fastsft.models.lora import LoraConfig, add_lora
from fastsft.train.ema import Ema
from fastsft.train.evaluate import batch_loss
from fastsft.train.optim import MasterAdamW


def advance(model: Any, optimizer: MasterAdamW, ema: Ema, steps: range) -> None:
    for step in steps:
        batch_loss(model, collated(4, step), normalizer=9.0).backward()
        optimizer.collect()
        optimizer.step(1e-2, optimizer.grad_norm())
        ema.update()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_recurrence(dtype: torch.dtype) -> None:
    model = model_of(dtype=dtype)
    optimizer = MasterAdamW(model, OptimOptions())
    ema = Ema(optimizer, 0.8)
    expected = {n: m.detach().double() for n, m in optimizer.masters.items()}
    for step in range(5):
        advance(model, optimizer, ema, range(step, step + 1))
        for name, master in optimizer.masters.items():
            expected[name] = 0.8 * expected[name] + 0.2 * master.detach().double()
    for name, average in ema.averages.items():
        assert average.dtype == torch.float32
        assert (average - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name
        assert not torch.equal(average, optimizer.masters[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_for_a_while(dtype: torch.dtype) -> None:
    model = model_of(dtype=dtype)
    optimizer = MasterAdamW(model, OptimOptions())
    ema = Ema(optimizer, 0.9)
    advance(model, optimizer, ema, range(3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    averages = {k: v.clone() for k, v in ema.averages.items()}
    masters = {k: v.detach().clone() for k, v in optimizer.masters.items()}

    def inside() -> None:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, averages[name].to(dtype)), name
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"), ema.applied():
        inside()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(masters[k], v) for k, v in optimizer.masters.items())
    assert all(torch.equal(averages[k], v) for k, v in ema.averages.items())


def test_state_round_trip_continues_bitwise() -> None:
    runs = []
    for resume in (False, True):
        model = model_of(dtype=torch.bfloat16)
        optimizer = MasterAdamW(model, OptimOptions())
        ema = Ema(optimizer, 0.9)
        advance(model, optimizer, ema, range(2))
        if resume:
            state = {k: v.clone() for k, v in (optimizer.state() | ema.state()).items()}
            model = model_of(seed=1, dtype=torch.bfloat16)
            optimizer = MasterAdamW(model, OptimOptions())
            ema = Ema(optimizer, 0.9)
            optimizer.load_state(state)
            ema.load_state(state)
        advance(model, optimizer, ema, range(2, 4))
        runs.append(ema.averages)
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])
    with pytest.raises(ValueError, match=r"ema/embed_tokens.weight: expected torch.float32 \[97, 48\], found none"):
        ema.load_state({})


def test_frozen_parameters_are_not_averaged() -> None:
    model = model_of()
    add_lora(model, LoraConfig(rank=2), seed=0)
    optimizer = MasterAdamW(model, OptimOptions())
    assert Ema(optimizer, 0.0).averages.keys() == optimizer.masters.keys()


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\), got "):
        Ema(MasterAdamW(model_of(), OptimOptions()), decay)
