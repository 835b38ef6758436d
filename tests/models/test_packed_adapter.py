"""Adapters beside packed weights: against the merged weights, and the bits of a row whatever shares its step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_cases import randomise
from packed_cases import SHAPE, Session, exact_logits, logits_in_training, model_of, tokens_of

from fastsft.models.adapter import save_adapter
from fastsft.models.decoder import Decoder
from fastsft.models.lora import LoraConfig, add_lora, merge_lora
from fastsft.models.packed import pack_decoder
from fastsft.models.packed_adapter import pack_adapter
from fastsft.models.weights import init_model

CONFIGS: dict[str, LoraConfig] = {
    "all": LoraConfig(rank=5, alpha=7.0),
    "some": LoraConfig(rank=20, alpha=9.0, targets=("k_proj", "up_proj", "layers.1.self_attn.o_proj")),
    "mlp": LoraConfig(rank=16, alpha=3.0, targets=("gate_proj", "down_proj"), rank_stabilised=True),
}


def adapted(config: LoraConfig, seed: int, kind: str = "biases", dtype: torch.dtype = torch.float32) -> Decoder:
    model = model_of(kind, dtype)
    add_lora(model, config, seed=seed)
    randomise(model, seed)
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("kind", ["biases", "qwen3", "tied, one key head"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float32_logits_are_those_of_the_merged_weights(config: LoraConfig, kind: str) -> None:
    model, (tokens,) = adapted(config, 7, kind), tokens_of(75)
    session = Session(pack_decoder(model_of(kind), "float32"))
    base = session.run(tokens)
    ours = session.run(tokens, 40, 1, 7, adapter=pack_adapter(session.packed, model))
    merge_lora(model)
    merged = Session(pack_decoder(model, "float32")).run(tokens)
    assert relative(base, merged) > 0.02
    assert relative(ours, merged) < 1e-5
    assert float((ours - merged).abs().max()) < 1e-5 * float(merged.abs().max())


def test_bfloat16_logits_are_as_good_as_in_training() -> None:
    model, (tokens,) = adapted(CONFIGS["all"], 7, "llama", torch.bfloat16), tokens_of(75)
    packed = pack_decoder(model_of("llama", torch.bfloat16), "bfloat16")
    ours = Session(packed).run(tokens, adapter=pack_adapter(packed, model))
    theirs, exact = logits_in_training(model, tokens), exact_logits(model, tokens)
    assert relative(ours, exact) < 1.2 * relative(theirs, exact)


def test_a_folder_is_the_model_that_it_was_saved_from(tmp_path: Path) -> None:
    model, (tokens,) = adapted(CONFIGS["some"], 7), tokens_of(20)
    save_adapter(model, tmp_path / "adapter")
    packed = pack_decoder(model_of("biases"), "int8")
    first, second = (
        Session(packed).run(tokens, adapter=pack_adapter(packed, a)) for a in (model, tmp_path / "adapter")
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "w8a8", "int4"])
def test_a_row_has_the_bits_that_it_has_alone(format: str) -> None:
    packed, texts = pack_decoder(model_of("biases"), format), tokens_of(61, 18, 3, 47, 16, 33, 1, 60)
    made = [pack_adapter(packed, adapted(config, seed)) for seed, config in enumerate(CONFIGS.values())]
    choice: list[Any] = [made[0], None, made[1], made[0], None, made[2], made[1], made[1]]
    alone = [Session(packed).run(tokens, adapter=adapter) for tokens, adapter in zip(texts, choice, strict=True)]
    assert torch.equal(alone[1], Session(packed).run(texts[1]))
    together = Session(packed)
    together.adapters = {i: adapter for i, adapter in enumerate(choice) if adapter}
    together.assert_rows(texts, alone)


def test_more_rows_than_a_chunk() -> None:
    packed, texts = pack_decoder(model_of("llama"), "float32"), tokens_of(300, 700, 200)
    adapter = pack_adapter(packed, adapted(CONFIGS["all"], 1, "llama"))
    session = Session(packed, num_blocks=128)
    session.adapters = {0: adapter, 1: adapter}
    together = session.step(dict(enumerate(texts)))
    for i, tokens in enumerate(texts):
        own = None if i == 2 else adapter
        assert torch.equal(Session(packed, num_blocks=128).run(tokens, 250, adapter=own), together[i]), i


def test_what_is_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    packed, other = pack_decoder(model, "float32"), pack_decoder(model, "float32")
    with pytest.raises(ValueError, match="expected one with adapters, found none"):
        pack_adapter(packed, model)
    small = init_model(SHAPE | {"intermediate_size": 64}, seed=0)
    add_lora(small, CONFIGS["all"], seed=1)
    with pytest.raises(ValueError, match="adapter: model: expected intermediate_size=168, got 64"):
        pack_adapter(packed, small)
    save_adapter(small, tmp_path / "adapter")
    with pytest.raises(ValueError, match="the tensors do not fit the model"):
        pack_adapter(packed, tmp_path / "adapter")
    session = Session(packed)
    session.adapters[0] = pack_adapter(other, adapted(CONFIGS["all"], 1, "llama"))
    with pytest.raises(ValueError, match="adapters: expected adapters of these weights"):
        session.step({0: [1]})
    mine = pack_adapter(packed, copy.deepcopy(adapted(CONFIGS["all"], 1, "llama")))
    one = (torch.tensor([[0]], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1]).int())
    with pytest.raises(ValueError, match="adapters: expected none, or one for each of 1 sequences, got 2"):
        packed.step(
            torch.tensor([1]), session.cache, *one, torch.tensor([0]),
            kv_format="float32", block_size=16, adapters=[mine, None],
        )  # fmt: skip
