"""Steps that want the logits of some rows: the others leave keys and values alone, whose bits do not depend on that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lora_cases import randomise
from packed_cases import BLOCK, model_of, tokens_of

from fastsft import _C
from fastsft.models.lora import LoraConfig, add_lora
from fastsft.models.packed import PackedDecoder, pack_decoder
from fastsft.models.packed_adapter import pack_adapter
from fastsft.ops.decoder import DecoderAdapter

LENGTHS = (300, 4, 1, 0, 140)  # the rows of a step's sequences ...
CONTEXTS = (300, 20, 270, 16, 157)  # ... and their tokens in the cache, those rows included
TOTAL = sum(LENGTHS)
WANTED = {
    "none": [],
    "one": [299],
    "the last of each": [299, 303, 304, 444],
    "drafts": [*range(296, 305), 444],
    "in no order, some twice": [444, 3, 443, 444, 302, 301, 0, 3, 304],
    "more than a chunk": [*range(100, 400)],
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = _C.num_threads()
    yield
    _C.set_num_threads(before)


def step(
    packed: PackedDecoder, wanted: list[int], adapters: list[DecoderAdapter | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [R, V], and the cache after the step."""
    options: dict[str, Any] = {"kv_format": str(packed.dtype).removeprefix("torch."), "block_size": BLOCK}
    width = -(-max(CONTEXTS) // BLOCK)
    cache = packed.new_cache(width * len(CONTEXTS), **options)
    cache.random_(0, 63, generator=torch.Generator().manual_seed(5))  # small keys and values, as if of earlier steps
    table = torch.arange(width * len(CONTEXTS), dtype=torch.int32).view(width, -1).T.contiguous()
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    contexts = torch.tensor(CONTEXTS, dtype=torch.int32)
    (ids,) = tokens_of(TOTAL)
    rows = torch.tensor(wanted, dtype=torch.int64)
    return packed.step(torch.tensor(ids), cache, table, bounds, contexts, rows, **options, adapters=adapters), cache


@pytest.mark.parametrize("format", ["float32", "bfloat16", "w8a8"])
@pytest.mark.parametrize("kind", ["biases", "windows in some layers"])
def test_they_have_the_bits_that_they_have_among_all(kind: str, format: str, threads: None) -> None:
    model = model_of(kind)
    packed = pack_decoder(model, format)
    add_lora(model, LoraConfig(rank=4), seed=0)
    made = []
    for seed in (1, 2):
        randomise(model, seed)
        made.append(pack_adapter(packed, model))
    first, second = made
    for adapters in [[], [first, first, None, second, second]]:
        whole, cache = step(packed, list(range(TOTAL)), adapters)
        for count in (1, 3):
            _C.set_num_threads(count)
            for name, wanted in WANTED.items():
                logits, left = step(packed, wanted, adapters)
                assert torch.equal(logits, whole[wanted]), (name, count)
                assert torch.equal(left, cache), (name, count)
