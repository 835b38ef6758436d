"""TRL's trainers with the plug-in take the steps that they take without it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl", minversion="1.16")
datasets = pytest.importorskip("datasets")

import trl  # noqa: E402
from plugin_cases import CONFIGS, VOCABULARY, build, ids  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl.kernels import ChunkedLogProbFunction  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402

import fastsft.integrations.transformers as plugin  # noqa: E402
import fastsft.integrations.trl as trl_plugin  # noqa: E402
from fastsft import ops  # noqa: E402
from fastsft.integrations._logprobs import LogProbFunction, is_top1  # noqa: E402

WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    plain = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def rows() -> Any:
    lengths = (5, 17, 9, 30, 12, 3, 21, 8)
    tokens = [ids(1, n)[0].tolist() for n in lengths]
    masked = [[-100] * (n // 3) + t[n // 3 :] for n, t in zip(lengths, tokens, strict=True)]
    return datasets.Dataset.from_list([{"input_ids": t, "labels": x} for t, x in zip(tokens, masked, strict=True)])


def run(trainer: Any) -> dict[str, list[float]]:
    trainer.train()
    found: dict[str, list[float]] = {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            found.setdefault(key, []).append(value)
    return found


COMMON: dict[str, Any] = {
    "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "bf16": False,
    "save_strategy": "no", "seed": 0,
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "padded": {},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 32},
    "dft": {"loss_type": "dft"},
    "logged by epoch": {
        "logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 2,
    },
    "logged at first and every other time": {"logging_first_step": True, "logging_steps": 2, "max_steps": 4},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_sft(mode: str, tmp_path: Path, tokenizer: Any) -> None:
    settings = {"per_device_train_batch_size": 4, **COMMON, **MODES[mode]}
    found = []
    for kind, attention in ((trl_plugin.SFTTrainer, "sdpa"), (trl.SFTTrainer, "eager")):
        trainer = kind(
            model=build(CONFIGS["llama"], attention), args=trl.SFTConfig(output_dir=str(tmp_path), **settings),
            train_dataset=rows(), processing_class=tokenizer,
        )  # fmt: skip
        found.append(run(trainer))
    ours, theirs = found
    assert len(ours["loss"]) == 3
    assert ours["mean_token_accuracy"][-1] > 0
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert ours[key] == pytest.approx(theirs[key], rel=2e-4), key


def test_sft_evaluates(tmp_path: Path, tokenizer: Any) -> None:
    settings = {**COMMON, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    found = []
    for kind in (trl_plugin.SFTTrainer, trl.SFTTrainer):
        trainer = kind(
            model=build(CONFIGS["qwen2"], "eager"), args=trl.SFTConfig(output_dir=str(tmp_path), **settings),
            train_dataset=rows(), eval_dataset=rows(), processing_class=tokenizer,
        )  # fmt: skip
        found.append(run(trainer))
    ours, theirs = found
    for key in ("eval_loss", "eval_mean_token_accuracy", "eval_entropy"):
        assert ours[key] == pytest.approx(theirs[key], rel=2e-4), key


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {"target_modules": "all-linear"}),
        ("qwen3", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    ],
    ids=["lora", "head", "tied head"],
)
def test_sft_with_lora(family: str, options: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    peft = pytest.importorskip("peft")
    config = copy.deepcopy(CONFIGS["qwen2"] if family == "tied" else CONFIGS[family])
    config.tie_word_embeddings = family == "tied"
    found = []
    for kind in (trl_plugin.SFTTrainer, trl.SFTTrainer):
        torch.manual_seed(0)
        trainer = kind(
            model=build(config, "eager"), args=trl.SFTConfig(output_dir=str(tmp_path), **COMMON),
            train_dataset=rows(), processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=4, init_lora_weights="gaussian", **options),
        )  # fmt: skip
        found.append(run(trainer))
    for key in ("loss", "grad_norm", "mean_token_accuracy"):
        assert found[0][key] == pytest.approx(found[1][key], rel=2e-4), key


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of the op got."""
    calls: list[int] = []
    true = ops.linear_logprobs
    monkeypatch.setattr(ops, "linear_logprobs", lambda h, *a, **k: (calls.append(len(h)), true(h, *a, **k))[1])
    return calls


def saved(family: str, folder: Path) -> Any:
    """From a folder, from which the trainers load their reference models."""
    build(CONFIGS[family], "eager").save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def words(n: int, length: int) -> str:
    return " ".join(f"w{i}" for i in ids(n + 1, length)[n].tolist())


def test_dpo(tmp_path: Path, tokenizer: Any, served: list[int]) -> None:
    pairs = datasets.Dataset.from_list(
        [{"prompt": words(i, 4 + i), "chosen": words(i, 3 + i % 3), "rejected": words(i, 9 - i % 4)} for i in range(8)]
    )
    found = []
    for ours in (True, False):
        model = saved("llama", tmp_path / "model")
        with trl_plugin.enabled() if ours else torch.enable_grad():
            trainer = trl.DPOTrainer(
                model=plugin.enable(model, loss=False) if ours else model,
                args=trl.DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4, **COMMON),
                train_dataset=pairs, processing_class=tokenizer,
            )  # fmt: skip
            if ours:
                plugin.enable(trainer.ref_model, loss=False)
            found.append(run(trainer))
    for steps in found:  # before the first update the two models are one, to the last bit
        assert [steps[key][0] for key in ("rewards/chosen", "rewards/rejected", "rewards/accuracies")] == [0, 0, 0]
    assert len(served) == 6  # model and reference; the labels' positions alone
    assert max(served) < 8 * 10
    for key in ("loss", "grad_norm", "rewards/margins"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-3, abs=1e-5), key


def test_grpo(tmp_path: Path, tokenizer: Any, served: list[int]) -> None:
    """The group's completions are sampled by transformers' generate, through our attention too."""
    prompts = datasets.Dataset.from_list([{"prompt": words(i, 3 + i)} for i in range(4)])

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(c.split()))) + c.count("1") for c in completions]

    found = []
    for ours in (True, False):
        model = saved("qwen2", tmp_path / "model")
        with trl_plugin.enabled() if ours else torch.enable_grad():
            trainer = trl.GRPOTrainer(
                model=plugin.enable(model, loss=False) if ours else model, reward_funcs=reward,
                args=trl.GRPOConfig(
                    output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4,
                    max_completion_length=6, beta=0.1, top_k=0, **COMMON
                ),
                train_dataset=prompts, processing_class=tokenizer,
            )  # fmt: skip
            found.append(run(trainer))
    assert len(served) == 6
    for key in ("reward", "loss", "grad_norm", "entropy"):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 1.0), (None, 0.5), (2.0, 0.5)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_log_probabilities_are_theirs(softcap: float | None, scale: float, bias: bool) -> None:
    torch.manual_seed(0)
    shapes = [(37, 16), (VOCABULARY, 16)] + [(VOCABULARY,)] * bias
    inputs = [torch.randn(*s, requires_grad=True) for s in shapes] + [None] * (not bias)
    targets = torch.randint(VOCABULARY, (37,))
    upstream = torch.randn(2, 37)
    found = []
    for function in (LogProbFunction, ChunkedLogProbFunction):
        results = function.apply(*inputs, targets, 0.7, 40, softcap, scale)
        gradients = torch.autograd.grad(
            (results[0] * upstream[0] + results[1] * upstream[1]).sum(), [x for x in inputs if x is not None]
        )
        found.append([*results, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for() -> None:
    hidden, weight = torch.randn(3, 8), torch.randn(11, 8)
    results = LogProbFunction.apply(hidden, weight, None, torch.tensor([1, 2, 3]), 1.0, 5, None, 1.0, ("log_probs",))
    assert [x is None for x in results] == [False, True, True, True, True]
    none = LogProbFunction.apply(hidden[:0], weight, None, torch.tensor([], dtype=torch.long), 1.0, 5)
    assert [x.shape for x in none] == [(0,)] * 5


@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_top_targets_are_found_from_the_rows_in_doubt(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nearly uniform distributions to nearly certain ones, with targets likeliest, second and last."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 16) * scale, torch.randn(VOCABULARY, 16)
    order = (hidden @ weight.T).argsort(1, descending=True)
    targets = order[torch.arange(300), torch.arange(300) % 3 * (torch.arange(300) % 3) ** 2]  # places 0, 1 and 8
    logprob, entropy = ops.linear_logprobs(hidden, weight, targets, return_entropy=True)
    looked_at: list[int] = []
    true = ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, *a: (looked_at.append(len(x)), true(x, *a))[1])
    assert is_top1(hidden, weight, targets, logprob, entropy).equal(targets == order[:, 0])
    assert sum(looked_at) <= {0.1: 300, 2.0: 150, 20.0: 30}[scale]


def test_a_partitioned_weight_is_refused() -> None:
    weight = torch.randn(11, 8)
    weight.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="weight: expected a whole tensor, got one of DeepSpeed"):
        LogProbFunction.apply(torch.randn(3, 8), weight, None, torch.tensor([1, 2, 3]), 1.0, 5)


def test_enable_and_disable() -> None:
    before = trl_utils._ChunkedLogProbFunction, trl_utils._use_triton
    trl_plugin.enable()
    trl_plugin.enable()
    assert trl_utils._ChunkedLogProbFunction is LogProbFunction
    trl_plugin.disable()
    trl_plugin.disable()
    assert (trl_utils._ChunkedLogProbFunction, trl_utils._use_triton) == before


def test_a_model_enabled_before_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="not enabled yet"):
        trl_plugin.SFTTrainer(
            model=plugin.enable(build(CONFIGS["llama"], "eager")),
            args=trl.SFTConfig(output_dir=str(tmp_path), **COMMON), train_dataset=rows(), processing_class=tokenizer,
        )  # fmt: skip
