"""The gradients of embedding and head go into one buffer that lives from step to step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train_cases import model_of, random_samples

from fastsft.config import ObjectiveOptions, OptimOptions
from fastsft.data.batch import collate
from fastsft.data.store import SampleStore
from fastsft.models.attend import VarlenAttend
from fastsft.train.objective import Objective
from fastsft.train.optim import MasterAdamW
from fastsft.train.parallel import Copies
from fastsft.train.selfcheck import check_packing
from fastsft.train.update import Update


class WideResults(TorchDispatchMode):
    """Which ops return a tensor of as many rows as the vocabulary, in memory that was not there before."""

    def __init__(self, rows: int, known: set[int]) -> None:
        super().__init__()
        self.rows, self.known, self.found = rows, known, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            wide = isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[0] == self.rows
            if wide and tensor.untyped_storage().data_ptr() not in self.known:
                self.found.append(str(func))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_step_takes_no_memory_of_the_size_of_the_vocabulary(dtype: torch.dtype, tied: bool) -> None:
    model = model_of(dtype=dtype, tie_word_embeddings=tied)
    optimizer = MasterAdamW(model, OptimOptions())
    update = Update(model, optimizer, Objective(ObjectiveOptions()), seed=0)
    batches = [collate(random_samples(5, seed)) for seed in range(2)]
    buffers: list[list[int]] = []
    inner = optimizer.step

    def step(rate: float, norm: torch.Tensor) -> None:
        wide = [one for one in optimizer.trained if one.master.shape[0] == model.config.vocab_size]
        gradients = [one.gradient for one in wide if one.gradient is not None]
        assert [g.dtype for g in gradients] == [torch.float32] * len(wide)
        buffers.append([g.data_ptr() for g in gradients])
        inner(rate, norm)

    optimizer.step = step  # type: ignore[method-assign]
    update(0, batches, 1e-3)
    known = {t.untyped_storage().data_ptr() for t in model.parameters()} | set(buffers[0])
    known |= {t.untyped_storage().data_ptr() for t in (*optimizer.masters.values(), *optimizer.state().values())}
    with WideResults(model.config.vocab_size, known) as seen:
        update(1, batches, 1e-3)
    assert buffers[0] == buffers[1]
    assert seen.found == []


def test_the_self_check_forms_no_gradient_of_the_head() -> None:
    """It looks at those of norms and biases, and comes before the buffers are there."""
    model = model_of(dtype=torch.bfloat16)
    samples = random_samples(6, 4)
    store = SampleStore.from_samples(samples)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with WideResults(model.config.vocab_size, known) as seen:
        check_packing(model, Objective(ObjectiveOptions()), store, np.arange(6), Copies(model))
    assert seen.found == []
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_s_gradient_is_autograd_s(dtype: torch.dtype) -> None:
    """Rows that come several times, and the padding row, which gets none."""
    model = model_of(dtype=dtype, pad_token_id=5, tie_word_embeddings=False)
    batch = collate(random_samples(9, 3))
    batch.ids[::7] = 5
    into, attend = torch.zeros(97, 48), VarlenAttend(batch.cu_seqlens)
    model(batch.ids, batch.position_ids, attend).float().square().sum().backward()
    expected = model.embed_tokens.weight.grad
    assert expected is not None
    model.embed_tokens.weight.grad = None
    for _ in range(2):
        model(batch.ids, batch.position_ids, attend, accumulate_into=into).float().square().sum().backward()
    assert model.embed_tokens.weight.grad is None
    difference = (into / 2 - expected.float()).norm() / expected.float().norm()
    assert float(difference) <= (1e-6 if dtype == torch.float32 else 1e-2)
    assert not into[5].any()
