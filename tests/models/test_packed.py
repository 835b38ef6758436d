"""The packed decoder against the one in training, and the bits of a row against everything that shares its step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packed_cases import KINDS, SHAPE, Session, exact_logits, logits_in_training, model_of, tokens_of

from fastsft import _C
from fastsft.models.decoder import Decoder
from fastsft.models.packed import pack_decoder
from fastsft.models.weights import init_model, save_model

FORMATS = ["float32", "bfloat16", "int8", "w8a8", "int4"]


@pytest.fixture
def threads() -> Iterator[None]:
    before = _C.num_threads()
    yield
    _C.set_num_threads(before)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_float32_logits_are_those_of_training(kind: str) -> None:
    model, (tokens,) = model_of(kind), tokens_of(75)
    session = Session(pack_decoder(model, "float32"))
    ours = session.run(tokens, 40, 1, 7)
    theirs, exact = logits_in_training(model, tokens), exact_logits(model, tokens)
    assert relative(ours, theirs) < 1e-5
    assert relative(ours, exact) < max(2 * relative(theirs, exact), 1e-6)
    assert float((ours - exact).abs().max()) < 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_logits_are_as_good_as_in_training(kind: str) -> None:
    model, (tokens,) = model_of(kind, torch.bfloat16), tokens_of(75)
    ours = Session(pack_decoder(model, "bfloat16")).run(tokens, 40, 1, 7)
    theirs, exact = logits_in_training(model, tokens), exact_logits(model, tokens)
    assert relative(ours, exact) < 1.2 * relative(theirs, exact)


@pytest.mark.parametrize(("format", "bound"), [("int8", 0.1), ("w8a8", 0.1), ("int4", 0.6)])
def test_quantised_logits_are_near(format: str, bound: float) -> None:
    model, (tokens,) = model_of("llama"), tokens_of(75)
    exact = exact_logits(model, tokens)
    errors = [relative(Session(pack_decoder(model, f)).run(tokens), exact) for f in ("bfloat16", format)]
    assert errors[0] < errors[1] < bound


def test_the_cache_in_int8_is_near() -> None:
    model, (tokens,) = model_of("llama"), tokens_of(75)
    exact = exact_logits(model, tokens)
    packed = pack_decoder(model, "float32")
    assert 1e-4 < relative(Session(packed, "int8").run(tokens), exact) < 0.03


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "windows in some layers"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_however_it_is_computed(format: str, kind: str, threads: None) -> None:
    packed, (tokens,) = pack_decoder(model_of(kind), format), tokens_of(61)
    _C.set_num_threads(1)
    whole = Session(packed).run(tokens)
    for sizes in [(1,), (2,), (5,), (17,), (30, 1), (50, 4, 1)]:  # single tokens, drafts, chunks
        assert torch.equal(Session(packed).run(tokens, *sizes), whole), sizes
    for count in (2, 3):
        _C.set_num_threads(count)
        assert torch.equal(Session(packed).run(tokens), whole), count
        assert torch.equal(Session(packed).run(tokens, 20, 1), whole), count


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_in_any_batch(format: str, threads: None) -> None:
    packed, texts = pack_decoder(model_of("llama"), format), tokens_of(61, 18, 3, 47, 16, 33, 1, 60)
    alone = [Session(packed).run(tokens) for tokens in texts]
    for count in (1, 2):
        _C.set_num_threads(count)
        Session(packed).assert_rows(texts, alone)


def test_more_rows_than_a_chunk() -> None:
    packed, (tokens,) = pack_decoder(model_of("llama"), "bfloat16"), tokens_of(1100)
    whole = Session(packed, num_blocks=128).run(tokens)
    assert torch.equal(Session(packed, num_blocks=128).run(tokens, 300, 799, 1), whole)


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_an_update_is_a_new_packing_in_the_old_memory(format: str) -> None:
    first, (tokens,) = model_of("biases"), tokens_of(20)
    second = model_of("biases")
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.25).add_(0.01)
    packed = pack_decoder(first, format)
    before, places = Session(packed).run(tokens), [layer.qkv.data.data_ptr() for layer in packed.weights.layers]
    packed.update(second)
    after = Session(packed).run(tokens)
    assert places == [layer.qkv.data.data_ptr() for layer in packed.weights.layers]
    assert not torch.equal(after, before)
    assert torch.equal(after, Session(pack_decoder(second, format)).run(tokens))
    packed.update(first)
    assert torch.equal(Session(packed).run(tokens), before)


@pytest.mark.parametrize("kind", ["qwen3", "tied, one key head"])
def test_a_folder_packs_like_the_model_in_it(kind: str, tmp_path: Path) -> None:
    model, (tokens,) = model_of(kind), tokens_of(20)
    save_model(model, tmp_path / "model")
    packed = pack_decoder(tmp_path / "model", "int8", head_format="bfloat16")
    assert torch.equal(
        Session(packed).run(tokens), Session(pack_decoder(model, "int8", head_format="bfloat16")).run(tokens)
    )
    packed.update(tmp_path / "model")
    assert packed.head_format == "bfloat16"


def test_what_is_refused() -> None:
    model = model_of("llama")
    packed = pack_decoder(model, "float32")
    with pytest.raises(ValueError, match=r"pack_decoder: format: expected one of float32, .*, got 'int5'"):
        pack_decoder(model, "int5")
    with pytest.raises(ValueError, match="head_dim: expected a multiple of 16 up to 256, got 24"):
        pack_decoder(_model(head_dim=24), "float32")
    with pytest.raises(ValueError, match="update: model: expected intermediate_size=168, got 64"):
        packed.update(_model(intermediate_size=64))
    with pytest.raises(ValueError, match="expected a folder"):
        pack_decoder("/nonexistent", "float32")
    session = Session(packed)
    for tokens in ([301], [-1]):
        with pytest.raises(ValueError, match=r"decoder_step: ids: expected \[0, 301\)"):
            session.step({0: tokens})
    with pytest.raises(ValueError, match="decoder_step: cache: expected float32 or int8"):
        Session(packed, "bfloat16").step({0: [1]})
    arguments = [torch.tensor([1]), session.cache, *(torch.tensor(x, dtype=torch.int32) for x in ([[0]], [0, 1], [1]))]
    for wanted in ([1], [-1]):
        with pytest.raises(ValueError, match=r"decoder_step: wanted: expected rows in \[0, 1\)"):
            packed.step(*arguments, torch.tensor(wanted), kv_format="float32", block_size=16)
    with pytest.raises(ValueError, match="decoder_step: ids: expected contiguous int64"):
        packed.step(arguments[0].int(), *arguments[1:], torch.tensor([0]), kv_format="float32", block_size=16)


def _model(**changes: int) -> Decoder:
    return init_model(SHAPE | changes, seed=0)
