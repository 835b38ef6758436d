"""enable(model): losses and gradients are transformers' own, whatever wraps the model; disable(model) undoes it."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from plugin_cases import COMMON, CONFIGS, assert_same_gradients, build, ids  # noqa: E402

from fastsft import ops  # noqa: E402
from fastsft.integrations._loss import FAMILIES  # noqa: E402
from fastsft.integrations.transformers import disable, enable, enabled  # noqa: E402

SPECIAL = {
    "gemma3_text": {"head_dim": 32, "sliding_window": 6, "final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 6},
    "gemma": {"head_dim": 32},
    "ministral": {"head_dim": 32, "sliding_window": 6},
    "seed_oss": {"head_dim": 32, "attention_dropout": 0.0, "residual_dropout": 0.0},
}


def config(family: str) -> Any:
    if family in CONFIGS:
        return CONFIGS[family]
    return transformers.AutoConfig.for_model(family, **{**COMMON, **SPECIAL.get(family, {})})


def labels(tokens: torch.Tensor, masked: int = 4) -> torch.Tensor:
    out = tokens.clone()
    out[:, :masked] = -100
    return out


def compare(ours: Any, theirs: Any, rtol: float = 1e-4, **inputs: Any) -> None:
    losses = []
    for model in (ours, theirs):
        model.zero_grad()
        losses.append(model(**inputs).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert_same_gradients(ours, theirs, rtol)


def pair(family: str) -> tuple[Any, Any]:
    return enable(build(config(family), "eager").train()), build(config(family), "eager").train()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_against_its_own_forward(family: str) -> None:
    ours, theirs = pair(family)
    tokens = ids(3, 17)
    mask = torch.ones_like(tokens)
    mask[1, 12:] = 0
    compare(ours, theirs, input_ids=tokens, attention_mask=mask, labels=labels(tokens).masked_fill(mask == 0, -100))
    assert ours(input_ids=tokens, labels=tokens).logits is None


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
@pytest.mark.parametrize("option", ["num_items_in_batch", "shift_labels", "ignore_index", "logits_to_keep"])
def test_options_of_the_loss(family: str, option: str) -> None:
    ours, theirs = pair(family)
    tokens = ids(2, 11)
    inputs: dict[str, Any] = {"input_ids": tokens, "labels": labels(tokens)}
    if option == "num_items_in_batch":
        compare(ours, theirs, **inputs, num_items_in_batch=torch.tensor(23))
        compare(ours, theirs, **inputs, num_items_in_batch=23)
    elif option == "shift_labels":
        compare(ours, theirs, **inputs, shift_labels=ids(2, 11).flip(0))
    elif option == "ignore_index":
        compare(ours, theirs, input_ids=tokens, labels=tokens, ignore_index=int(tokens[0, 3]))
    else:
        compare(ours, theirs, input_ids=tokens, labels=tokens[:, -5:], logits_to_keep=5)
        compare(ours, theirs, input_ids=tokens, labels=tokens[:, [2, 4, 7]], logits_to_keep=torch.tensor([2, 4, 7]))


def test_a_bias_of_the_head() -> None:
    ours, theirs = build(config("llama"), "eager").train(), build(config("llama"), "eager").train()
    for model in (ours, theirs):
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 97))
    compare(enable(ours), theirs, input_ids=ids(2, 9), labels=ids(2, 9))


def test_tied_weights() -> None:
    settings = copy.deepcopy(config("qwen2"))
    settings.tie_word_embeddings = True
    ours, theirs = enable(build(settings, "eager").train()), build(settings, "eager").train()
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    compare(ours, theirs, input_ids=ids(2, 9), labels=ids(2, 9))


def test_no_token_with_a_label_is_a_loss_of_zero() -> None:
    ours, _ = pair("llama")
    loss = ours(input_ids=ids(2, 9), labels=torch.full((2, 9), -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in ours.parameters())


def test_without_labels_in_evaluation_and_with_a_loss_of_ones_own_the_forward_is_the_models() -> None:
    ours, theirs = pair("llama")
    tokens = ids(2, 9)
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    ours.eval()
    theirs.eval()
    found = ours(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(found.logits, theirs(input_ids=tokens, labels=tokens).logits, rtol=1e-5, atol=1e-5)
    ours.train()
    ours.loss_function = lambda logits, labels, **_: logits.sum()
    assert ours(input_ids=tokens, labels=tokens).logits is not None


def test_outputs_and_positional_arguments() -> None:
    ours, theirs = pair("llama")
    tokens = ids(2, 9)
    (loss,) = ours(tokens, labels=tokens, use_cache=False, return_dict=False)
    torch.testing.assert_close(loss, theirs(tokens, labels=tokens).loss, rtol=1e-5, atol=1e-6)
    states = ours(input_ids=tokens, labels=tokens, output_hidden_states=True).hidden_states
    assert len(states) == 3


def test_disable_restores_and_enable_is_seen() -> None:
    ours, theirs = pair("qwen2")
    assert ours.config._attn_implementation == "fastsft"
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    tokens = ids(2, 9)
    with pytest.raises(ValueError, match="not enabled yet"):
        enable(ours)
    disable(ours)
    assert ours.config._attn_implementation == "eager"
    assert not any("forward" in m.__dict__ for m in ours.modules())
    ours.set_attn_implementation("eager")
    assert torch.equal(ours(input_ids=tokens, labels=tokens).loss, theirs(input_ids=tokens, labels=tokens).loss)
    with pytest.raises(ValueError, match="that enable"):
        disable(ours)
    with enabled(ours) as inside:
        assert inside(input_ids=tokens, labels=tokens).logits is None
    assert ours(input_ids=tokens, labels=tokens).logits is not None


def test_what_wrapped_the_forward_since_is_not_lost() -> None:
    ours, _ = pair("llama")
    wrapped = ours.forward
    ours.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM has been wrapped since"):
        disable(ours)


def test_parts_can_be_left_out() -> None:
    model = enable(build(config("llama"), "eager").train(), attention=False, layers=False)
    assert model.config._attn_implementation == "eager"
    assert [m for m in model.modules() if "forward" in m.__dict__] == [model, model.lm_head]
    disable(model)
    enable(model, loss=False)
    assert model(input_ids=ids(1, 5), labels=ids(1, 5)).logits is not None


def test_layers_are_served_by_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair("qwen3")
    calls: list[str] = []
    for name in ("rms_norm", "swiglu", "varlen_attention", "linear_cross_entropy"):
        true = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, f=true, n=name, **k: (calls.append(n), f(*a, **k))[1])
    ours(input_ids=ids(1, 5), labels=ids(1, 5))
    counts = {name: calls.count(name) for name in set(calls)}
    # Two layers of two norms, and norms of queries and keys; a last one.
    assert counts == {"rms_norm": 9, "swiglu": 2, "varlen_attention": 2, "linear_cross_entropy": 1}


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    ours, theirs = pair("llama")
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    compare(copied, theirs, input_ids=ids(2, 9), labels=ids(2, 9))
    disable(copied)


def test_unknown_models_are_refused() -> None:
    unknown = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match=r"model: expected a causal language model of cohere, .* got GPT2LMHeadModel"):
        enable(unknown)
    assert not any("forward" in m.__dict__ for m in unknown.modules())
    enable(unknown, loss=False)


def test_activation_checkpointing() -> None:
    ours, theirs = pair("gemma2")
    for model in (ours, theirs):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    positions = torch.cat([torch.arange(4), torch.arange(13)])[None].expand(2, -1)
    tokens = ids(2, 17)
    compare(ours, theirs, input_ids=tokens, labels=tokens, position_ids=positions, use_cache=False)


@pytest.mark.parametrize("first", ["enable", "peft"])
def test_lora(first: str) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    pair: list[Any] = []
    for ours in (True, False):
        model = build(config("qwen2"), "eager").train()
        if ours and first == "enable":
            enable(model)
        torch.manual_seed(3)
        model = peft.get_peft_model(model, settings)
        pair.append(enable(model) if ours and first == "peft" else model)
    tokens = ids(2, 13)
    compare(*pair, input_ids=tokens, labels=labels(tokens))
    disable(pair[0])


def test_lora_on_the_head_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        enable(build(config("qwen2"), "eager").train()), peft.LoraConfig(r=4, target_modules=["lm_head"])
    )
    with pytest.raises(ValueError, match="lm_head: expected the one that"):
        model(input_ids=ids(1, 5), labels=ids(1, 5))


def test_a_head_that_peft_trains_whole() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    pair = []
    for ours in (True, False):
        model = build(config("qwen3"), "eager").train()
        torch.manual_seed(3)
        pair.append(peft.get_peft_model(enable(model) if ours else model, settings))
    compare(*pair, input_ids=ids(2, 9), labels=ids(2, 9))


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_prompts_that_are_learnt(kind: str) -> None:
    """Keys without tokens before a row's own, and rows longer than their ids."""
    peft = pytest.importorskip("peft")
    pair = []
    for ours in (True, False):
        model = build(config("llama"), "eager").train()
        torch.manual_seed(3)
        settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
        pair.append(peft.get_peft_model(enable(model) if ours else model, settings))
    tokens = ids(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    compare(*pair, input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100))


def test_what_learnt_prefixes_do_not_go_with_is_refused() -> None:
    """Gradient checkpointing drops their keys; left padding lies between them and the tokens."""
    peft = pytest.importorskip("peft")
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(enable(build(config("llama"), "eager").train()), settings)
    tokens = ids(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    with pytest.raises(ValueError, match=r"attention_mask: expected one run of ones .*after a learnt prefix"):
        model(input_ids=tokens, attention_mask=mask, labels=tokens)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match=r"attention_mask: .* the 9 keys .*give gradient_checkpointing=False"):
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_sixteen_bits_err_no_more_than_transformers_do(how: str) -> None:
    exact, inputs = None, {"input_ids": ids(4, 33), "labels": ids(4, 33)}
    errors = []
    for kind in ("exact", "eager", "ours"):
        model = build(config("qwen3"), "eager").train()
        if kind == "ours":
            enable(model)
        if kind != "exact" and how == "bfloat16":
            model.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != "exact" and how == "autocast"):
            loss = model(**inputs).loss
        loss.backward()
        found = torch.cat([p.grad.float().flatten() for p in model.parameters()])
        exact = found if exact is None else exact
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[2] <= 1.5 * errors[1]
    assert errors[1] > 1e-3


def test_compiled_in_one_graph() -> None:
    torch.compiler.reset()
    ours, theirs = pair("qwen3")
    tokens = ids(2, 13)
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    targets = labels(tokens).masked_fill(mask == 0, -100)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": targets, "use_cache": False}
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).loss, theirs(**inputs).loss, rtol=1e-5, atol=1e-6)
    compiled(**inputs).loss.backward()
    theirs(**inputs).loss.backward()
    assert_same_gradients(ours, theirs)


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    """Columns found by the forward's signature; micro-batches of unlike size make the gradient of their union."""
    pytest.importorskip("accelerate")
    rows = [{"input_ids": ids(1, n)[0].tolist(), "labels": ids(1, n)[0].tolist()} for n in (5, 17, 9, 30) * 2]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        flat = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
        out: dict[str, torch.Tensor] = flat(batch)
        return out

    def losses(model: Any, size: int, steps: int) -> list[float]:
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=3,
            logging_steps=1, learning_rate=1e-2, report_to="none", use_cpu=True, save_strategy="no", seed=0,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate)
        trainer.train()
        return [x["loss"] for x in trainer.state.log_history if "loss" in x]

    theirs = losses(build(config("llama"), "eager"), 2, 2)
    for size, steps in ((2, 2), (1, 4), (4, 1)):
        assert losses(enable(build(config("llama"), "eager")), size, steps) == pytest.approx(theirs, rel=1e-4)
