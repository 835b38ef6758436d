"""Ours against transformers on random tiny models of every family and feature.

``python tests/models/parity_table.py`` prints the table; the tests import the cases and the measurement.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastsft.models.attend import VarlenAttend
from fastsft.models.decoder import Decoder
from fastsft.models.weights import load_model

TINY: dict[str, Any] = {
    "vocab_size": 113,
    "hidden_size": 128,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,  # wide enough for sharp attention and distinct logits
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 32}


def _family(model_type: str, **own: Any) -> dict[str, dict[str, Any]]:
    """Tied and untied, grouped-query and multi-head."""
    cases = {}
    for tied in (False, True):
        for kv_heads in (2, 4):
            name = f"{model_type} {'tied' if tied else 'untied'} {'GQA' if kv_heads == 2 else 'MHA'}"
            keys = {"model_type": model_type, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
            cases[name] = TINY | keys | own
    return cases


def _one(model_type: str, feature: str, **own: Any) -> dict[str, dict[str, Any]]:
    return {f"{model_type} {feature}": TINY | {"model_type": model_type} | own}


CASES: dict[str, dict[str, Any]] = (
    _family("llama")
    | _family("qwen2")
    | _family("qwen3", head_dim=64)
    | _family("mistral", sliding_window=None)
    | _one("llama", "attention_bias mlp_bias", attention_bias=True, mlp_bias=True)
    | _one("llama", "head_dim 64", head_dim=64)
    | _one("llama", "multi-query", num_key_value_heads=1)
    | _one("llama", "pad token", pad_token_id=5)
    | _one("llama", "rope theta 1e6", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    | _one("llama", "rope linear", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5})
    | _one("llama", "rope llama3", rope_parameters=LLAMA3)
    | _one("llama", "rope yarn", rope_parameters=YARN)
    | _one("llama", "rope yarn betas", rope_parameters=YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False})
    | _one("llama", "rope yarn attention_factor", rope_parameters=YARN | {"attention_factor": 1.3})
    | _one("llama", "rope yarn mscale", rope_parameters=YARN | {"mscale": 0.9, "mscale_all_dim": 0.5})
    | _one("qwen2", "rope yarn, head_dim 128", head_dim=128, rope_parameters=YARN | {"rope_theta": 1000000.0})
    | _one("qwen3", "attention_bias", head_dim=64, attention_bias=True)
    | _one("qwen3", "default head_dim", num_hidden_layers=1)
    | _one("mistral", "window 7", sliding_window=7)
    | _one("mistral", "window 2", sliding_window=2)
    | _one("qwen2", "window 9 from layer 1", use_sliding_window=True, sliding_window=9, max_window_layers=1)
    | _one(
        "qwen3",
        "window 6 by layer_types",
        head_dim=64,
        use_sliding_window=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
)  # fmt: skip


def reference(keys: dict[str, Any], seed: int = 0) -> Any:
    """A random transformers model in float32, eager attention; biases and norms are random too, so that they count."""
    transformers = pytest.importorskip("transformers")

    keys = dict(keys)
    config = transformers.AutoConfig.for_model(keys.pop("model_type"), **keys)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return model.eval()


def pair(keys: dict[str, Any], folder: Path) -> tuple[Any, Decoder]:
    """The same weights in transformers and here, by way of a saved folder."""
    theirs = reference(keys)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)


def logits(model: Decoder, documents: list[torch.Tensor]) -> torch.Tensor:
    """Packed documents -> [T, V]."""
    lengths = [len(d) for d in documents]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    position_ids = torch.cat([torch.arange(n) for n in lengths])
    hidden = model(torch.cat(documents), position_ids, VarlenAttend(cu_seqlens))
    return F.linear(hidden, model.lm_head_weight)


def greedy(model: Decoder, prompt: torch.Tensor, steps: int) -> torch.Tensor:
    """Generated ids, each from a full forward pass."""
    ids = prompt
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, logits(model, [ids])[-1:].argmax(-1)])
    return ids[len(prompt) :]


@dataclass(frozen=True)
class Parity:
    max_error: float
    """Largest logit difference, relative to the largest logit."""
    magnitude: float
    tokens_equal: int
    """Length of the common prefix of the greedy generations."""
    tokens: int


def measure(theirs: Any, ours: Decoder, *, length: int = 150, steps: int = 32) -> Parity:
    """Logits over ``length`` positions (beyond the rope's original context and every window), and greedy tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, ours.config.vocab_size, (length,), generator=generator)
    with torch.no_grad():
        expected = theirs(ids[None], use_cache=False).logits[0]
        got = logits(ours, [ids])
        prompt = ids[:17]
        generated = theirs.generate(
            prompt[None], attention_mask=torch.ones(1, 17), max_new_tokens=steps, do_sample=False, eos_token_id=None
        )[0, 17:]
    same = (generated == greedy(ours, prompt, steps)).long().cumprod(0).sum()
    magnitude = float(expected.abs().max())
    return Parity(float((got - expected).abs().max()) / magnitude, magnitude, int(same), steps)


def main() -> None:
    print(f"{'case':<36} {'max |logit|':>11} {'max error / max':>15} {'greedy tokens equal':>20}")
    for name, keys in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            row = measure(*pair(keys, Path(folder)))
        print(f"{name:<36} {row.magnitude:>11.2f} {row.max_error:>15.1e} {f'{row.tokens_equal} of {row.tokens}':>20}")


if __name__ == "__main__":
    sys.exit(main())
