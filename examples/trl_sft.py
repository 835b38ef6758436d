"""Supervised fine-tuning with TRL; attention, layers and loss are fastsft's.

    python examples/trl_sft.py path/or/name/of/a/model rows.jsonl

A script around ``trl.SFTTrainer`` changes in one line, the import below; two more arguments (marked) drop the padding.
Rows are what TRL takes: ``{"prompt": ..., "completion": ...}``, ``messages`` or ``text``. Without arguments a tiny
model with random weights and a few rows stand in, so that the script can be tried without a download.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import datasets
import tokenizers
import transformers
from trl import SFTConfig

from fastsft.integrations.trl import SFTTrainer  # was: from trl import SFTTrainer


def load(name: str | None) -> tuple[Any, Any]:
    if name:
        return transformers.AutoModelForCausalLM.from_pretrained(name), transformers.AutoTokenizer.from_pretrained(name)
    bytes_alone = tokenizers.Tokenizer(tokenizers.models.BPE())
    bytes_alone.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bytes_alone.train_from_iterator([], tokenizers.trainers.BpeTrainer(vocab_size=258, initial_alphabet=alphabet))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<eos>", pad_token="<pad>")
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config), tokenizer


def rows(path: str | None) -> Any:
    if path:
        return datasets.load_dataset("json", data_files=path, split="train")
    made = [{"prompt": f"def add_{n}(x):", "completion": f"\n    return x + {n}\n"} for n in range(64)]
    return datasets.Dataset.from_list(made)


def main(name: str | None = None, path: str | None = None, steps: int = 30) -> tuple[float, float]:
    """Train and return the first and the last loss."""
    transformers.set_seed(0)
    model, tokenizer = load(name)
    settings = SFTConfig(
        output_dir="runs/trl" if name else tempfile.mkdtemp(),
        padding_free=True,  # new: documents end to end, no padding
        max_length=None,  # new: with padding_free
        bf16=bool(name), learning_rate=2e-5 if name else 1e-2, max_steps=-1 if name else steps,
        num_train_epochs=1, logging_steps=1, report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=settings, train_dataset=rows(path), processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[0], losses[-1]


if __name__ == "__main__":
    main(*sys.argv[1:3])
