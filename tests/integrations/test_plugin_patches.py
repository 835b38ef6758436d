"""What enable() must not go past, and that enable() and disable() act on the whole model or not at all."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from plugin_cases import CONFIGS, assert_same_gradients, build, ids  # noqa: E402

from fastsft.integrations import _patches  # noqa: E402
from fastsft.integrations.transformers import disable, enable  # noqa: E402

TOKENS = ids(2, 9)
INPUTS = {"input_ids": TOKENS, "labels": TOKENS}


def llama(**changes: Any) -> Any:
    settings = copy.deepcopy(CONFIGS["llama"])
    settings.update(changes)
    return build(settings, "eager").train()


def assert_untouched(model: Any) -> None:
    assert model.config._attn_implementation == "eager"
    assert not any(_patches.is_patched(module) for module in model.modules())


def double(self: Any, *args: Any, **kwargs: Any) -> Any:
    out = type(self).forward(self, *args, **kwargs)
    if getattr(out, "loss", None) is not None:
        out.loss = out.loss * 2
        return out
    return out * 2 if isinstance(out, torch.Tensor) else out


class OwnForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
    forward = double


class PlainForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
    pass


def test_a_subclass_with_a_forward_of_its_own_is_refused() -> None:
    model = OwnForCausalLM(CONFIGS["llama"])
    with pytest.raises(ValueError, match=r"transformers gives a llama model, got that of .*OwnForCausalLM"):
        enable(model, attention=False)
    assert not any(_patches.is_patched(module) for module in model.modules())
    enable(PlainForCausalLM(CONFIGS["llama"]))


def test_a_class_whose_forward_was_replaced_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    true = transformers.LlamaForCausalLM.forward
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", functools.wraps(true)(lambda *a, **k: true(*a, **k)))
    model = llama()
    with pytest.raises(ValueError, match="transformers gives a llama model"):
        enable(model)
    assert_untouched(model)


def test_layers_of_a_class_whose_forward_was_wrapped_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = transformers.models.llama.modeling_llama.LlamaMLP
    true = kind.forward
    monkeypatch.setattr(kind, "forward", functools.wraps(true)(lambda self, x: 2 * true(self, x)))
    model, other = llama(), llama()
    torch.testing.assert_close(enable(model)(**INPUTS).loss, other(**INPUTS).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["model", "lm_head"])
def test_a_forward_that_was_wrapped_before_is_refused(which: str) -> None:
    model = llama()
    wrapped = model if which == "model" else model.lm_head
    wrapped.forward = types.MethodType(double, wrapped)
    with pytest.raises(ValueError, match=f"the forward of {type(wrapped).__name__} has been wrapped already"):
        enable(model)
    assert_untouched(model)
    with_forward = enable(model, loss=False)(**INPUTS).loss
    disable(model)
    torch.testing.assert_close(with_forward, model(**INPUTS).loss, rtol=1e-5, atol=1e-5)


def test_the_hooks_of_a_device_map_are_refused_and_may_be_taken_off() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, other = llama(), llama()
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with pytest.raises(ValueError, match=r"no hooks of accelerate .* loss=False, or, .* take them off: accelerate"):
        enable(model)
    assert_untouched(model)
    torch.testing.assert_close(enable(model, loss=False)(**INPUTS).loss, other(**INPUTS).loss, rtol=1e-5, atol=1e-5)
    disable(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert enable(model)(**INPUTS).logits is None


def test_a_layer_whose_forward_was_wrapped_before_is_left_alone() -> None:
    pair = [llama(), llama()]
    for model in pair:
        for module in (model.model.norm, model.model.layers[0].mlp):
            module.forward = types.MethodType(double, module)
    enable(pair[0])
    for model in pair:
        model(**INPUTS).loss.backward()
    assert_same_gradients(*pair)
    disable(pair[0])
    assert pair[0].model.norm.forward.__func__ is double


def test_a_failure_of_enable_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsft.integrations import transformers as plugin

    model, calls = llama(), 0

    def fails_late(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("half way")
        _patches.replace_forward(*args)

    monkeypatch.setattr(plugin, "replace_forward", fails_late)
    with pytest.raises(RuntimeError, match="half way"):
        enable(model)
    assert_untouched(model)
    monkeypatch.undo()
    disable(enable(model))


def test_a_module_that_is_patched_already_is_seen_before_anything_is_changed() -> None:
    model, enabled = llama(), enable(llama())
    model.model.norm = enabled.model.norm
    with pytest.raises(ValueError, match="expected no module of another enabled model"):
        enable(model)
    assert model.config._attn_implementation == "eager"
    assert sum(_patches.is_patched(module) for module in model.modules()) == 1


def test_a_failure_of_disable_undoes_nothing_and_it_works_afterwards() -> None:
    model = enable(llama())
    patched = [module for module in model.modules() if _patches.is_patched(module)]
    mlp = model.model.layers[1].mlp
    before = mlp.forward
    mlp.forward = lambda x: before(x)
    with pytest.raises(RuntimeError, match="LlamaMLP has been wrapped since"):
        disable(model)
    assert [module for module in model.modules() if _patches.is_patched(module)] == patched
    assert model.config._attn_implementation == "fastsft"
    mlp.forward = before
    disable(model)
    assert_untouched(model)


@pytest.mark.parametrize("saved", ["lm_head", "norm", "mlp"])
def test_disable_restores_the_copies_that_peft_made(saved: str) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[saved])
    merged = peft.get_peft_model(enable(llama()), settings).merge_and_unload()
    disable(merged)
    assert_untouched(merged)
    assert not any("forward" in module.__dict__ for module in merged.modules())
    enable(merged)
    assert merged.train()(**INPUTS).logits is None


@pytest.mark.parametrize("adapter", [True, False])
def test_enable_after_peft_has_copied_the_head(adapter: bool) -> None:
    peft = pytest.importorskip("peft")
    pair = []
    for ours in (True, False):
        torch.manual_seed(3)
        settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = peft.get_peft_model(llama(), settings).train()
        with torch.no_grad():
            model.base_model.lm_head.modules_to_save["default"].weight.mul_(1.5)
        pair.append(enable(model) if ours else model)
    if adapter:
        for model in pair:
            model(**INPUTS).loss.backward()
        assert_same_gradients(*pair)
    else:
        with pair[0].disable_adapter(), pair[1].disable_adapter():
            torch.testing.assert_close(pair[0](**INPUTS).loss, pair[1](**INPUTS).loss, rtol=1e-5, atol=1e-6)
    assert pair[0](**INPUTS).logits is None
    assert_untouched(disable(pair[0]))


def test_a_head_that_peft_made_anew_is_refused() -> None:
    peft = pytest.importorskip("peft", minversion="0.18")
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(enable(llama(tie_word_embeddings=True)), settings)
    with pytest.raises(ValueError, match=r"lm_head: expected the one that enable\(\) saw"):
        model(**INPUTS)


def test_pickling_says_what_to_do() -> None:
    model = enable(llama())
    with pytest.raises(TypeError, match=r"an enabled model cannot be pickled; save its state_dict"):
        pickle.dumps(model)
    found = pickle.loads(pickle.dumps(disable(model)))
    assert enable(found)(**INPUTS).logits is None


def test_replicas_are_refused() -> None:
    model = enable(llama())
    with pytest.raises(RuntimeError, match=r"torch.nn.DataParallel makes replicas"):
        model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"torch.nn.DataParallel makes replicas"):
        copy.deepcopy(model)._replicate_for_data_parallel()
    disable(model)._replicate_for_data_parallel()
