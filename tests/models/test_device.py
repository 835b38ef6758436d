"""The decoder on a device, run here on CPU tensors: against float64 references, in pieces, with adapters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from packed_cases import KINDS, SHAPE, exact_logits, logits_in_training, model_of, tokens_of
from torch import Tensor

from fastsft.models.decoder import Decoder
from fastsft.models.device import DeviceDecoder, Rows, Span, place_adapter, place_decoder
from fastsft.models.lora import LoraConfig, add_lora, lora_layers, merge_lora
from fastsft.models.weights import init_model, save_model

BLOCK, BLOCKS = 16, 40


class Session:
    """Sequences over a cache whose blocks are in no order and begin as rubbish."""

    def __init__(self, model: DeviceDecoder) -> None:
        self.model = model
        self.cache = model.new_cache(BLOCKS, BLOCK).normal_()
        self.free = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(2)).tolist()
        self.blocks: list[list[int]] = []
        self.computed: list[int] = []

    def open(self, length: int) -> int:
        self.blocks.append([self.free.pop() for _ in range(-(-length // BLOCK))])
        self.computed.append(0)
        return len(self.blocks) - 1

    @torch.inference_mode()
    def step(self, work: dict[int, list[int]], spans: Sequence[Span] = ()) -> list[Tensor]:
        """Logits [tokens, V] of each sequence's next tokens."""
        positions, slots = [], []
        for name, tokens in work.items():
            for position in range(self.computed[name], self.computed[name] + len(tokens)):
                positions.append(position)
                slots.append(self.blocks[name][position // BLOCK] * BLOCK + position % BLOCK)
            self.computed[name] += len(tokens)
        bounds = [0, *itertools.accumulate(map(len, work.values()))]
        width = max(len(self.blocks[name]) for name in work)
        rows = Rows(
            torch.tensor([t for tokens in work.values() for t in tokens]),
            torch.tensor(positions),
            torch.tensor(slots),
            torch.tensor([self.blocks[n] + [0] * (width - len(self.blocks[n])) for n in work], dtype=torch.int32),
            torch.tensor(bounds, dtype=torch.int32),
            torch.tensor([self.computed[n] for n in work], dtype=torch.int32),
        )
        logits = self.model.logits(self.model.hidden(rows, self.cache, spans))
        return [logits[a:b] for a, b in itertools.pairwise(bounds)]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_the_decoder_s(kind: str, dtype: torch.dtype) -> None:
    """Three prompts in pieces of different sizes that share steps, then token by token."""
    model = model_of(kind, dtype)
    session = Session(place_decoder(model, str(dtype).removeprefix("torch."), device="cpu"))
    prompts = tokens_of(37, 5, 60)
    names = [session.open(len(p)) for p in prompts]
    found: dict[int, list[Tensor]] = {n: [] for n in names}
    for sizes in [(20, 3, 31), (9, 1, 20), *[(1, 1, 1)] * 9]:
        work = {}
        for name, prompt, size in zip(names, prompts, sizes, strict=True):
            if piece := prompt[session.computed[name] :][:size]:
                work[name] = piece
        for name, logits in zip(work, session.step(work), strict=True):
            found[name].append(logits)
    for name, prompt in zip(names, prompts, strict=True):
        logits = torch.cat(found[name])
        assert len(logits) == len(prompt)
        assert logits.dtype == torch.float32
        exact = exact_logits(model, prompt)
        assert relative(logits, exact) < 1.2 * relative(logits_in_training(model, prompt), exact) + 1e-7


@pytest.mark.parametrize(("format", "bound"), [("int8", 0.1), ("int4", 0.6)])
@pytest.mark.parametrize("kind", ["llama", "tied, one key head"])
def test_quantised_logits_are_near(format: str, bound: float, kind: str) -> None:
    model, (tokens,) = model_of(kind), tokens_of(75)
    exact = exact_logits(model, tokens)
    errors = []
    for name in ("bfloat16", format):
        session = Session(place_decoder(model, name, device="cpu"))
        (logits,) = session.step({session.open(75): tokens})
        errors.append(relative(logits, exact))
    assert errors[0] < errors[1] < bound


def test_folders_give_what_models_give(tmp_path: object) -> None:
    model = model_of("tied, one key head")
    save_model(model, f"{tmp_path}/model")
    prompt = tokens_of(20)[0]
    logits = []
    for source in (model, f"{tmp_path}/model"):
        session = Session(place_decoder(source, "float32", device="cpu"))
        logits += session.step({session.open(20): prompt})
    assert torch.equal(*logits)


def test_new_weights_keep_their_addresses() -> None:
    """Graphs of a step hold the addresses: an update goes into the same memory."""
    placed, other = (
        place_decoder(model_of("biases"), "float32", device="cpu"),
        init_model(SHAPE | KINDS["biases"], seed=9),
    )
    before = [t.data_ptr() for t in tensors_of(placed)]
    placed.update(other)
    assert [t.data_ptr() for t in tensors_of(placed)] == before
    prompt = tokens_of(20)[0]
    session = Session(placed)
    (logits,) = session.step({session.open(20): prompt})
    torch.testing.assert_close(logits, logits_in_training(other, prompt))
    with pytest.raises(ValueError, match="update: model: expected num_hidden_layers=3, got 1"):
        placed.update(init_model(SHAPE | KINDS["biases"] | {"num_hidden_layers": 1}, seed=9))


def tensors_of(model: DeviceDecoder) -> list[Tensor]:
    found = [model.embedding, model.norm, model.head.data]
    for layer in model.layers:
        found += [t for t in vars(layer).values() if isinstance(t, Tensor)]
        found += [w.data for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return found


def test_adapters_are_the_merged_models() -> None:
    """Of two sequences in one step each goes through its own; a third goes through none."""
    base = model_of("llama")
    placed = place_decoder(base, "float32", device="cpu")
    prompts = tokens_of(9, 20, 7)
    adapters, expected = [], []
    for seed, prompt in enumerate(prompts[:2]):
        model = adapted(seed)
        adapters.append(place_adapter(placed, model))
        merge_lora(model)
        expected.append(logits_in_training(model, prompt))
    expected.append(logits_in_training(base, prompts[2]))
    session = Session(placed)
    work = {session.open(len(p)): p for p in prompts}
    for found, logits in zip(session.step(work, [(0, 9, adapters[0]), (9, 29, adapters[1])]), expected, strict=True):
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected[0], logits_in_training(base, prompts[0]), atol=1e-2)


def adapted(seed: int) -> Decoder:
    model = model_of("llama")
    add_lora(
        model, LoraConfig(rank=3 + seed, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")), seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B.normal_(0, 0.1, generator=generator)
    return model


def test_what_is_refused() -> None:
    with pytest.raises(
        ValueError, match="place_decoder: format: expected one of float32, bfloat16, int8, int4, got 'float16'"
    ):
        place_decoder(model_of("llama"), "float16", device="cpu")
    with pytest.raises(ValueError, match=r"place_decoder: head_dim: expected one of .*, got 48"):
        place_decoder(init_model(SHAPE | {"head_dim": 48}, seed=1), "float32", device="cpu")
