"""A forked DataLoader worker uses the native ops without hanging, after the parent has used them."""

from __future__ import annotations

import pytest
import torch

from fastsft import ops


class Signatures(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        texts = [f"def f{i}(x): return x + {i} * {index}" for i in range(200)]
        return int(ops.minhash_signatures(texts).sum() % 1_000_003)


@pytest.mark.timeout(60)
def test_workers_after_the_parent_used_the_pool() -> None:
    data = Signatures()
    expected = [data[i] for i in range(len(data))]
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [int(x) for x in loader] == expected
