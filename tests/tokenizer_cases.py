"""Small tokenizers of every family: byte-level, and SentencePiece's with a space before a text in each of its forms."""

from __future__ import annotations

import string
from functools import cache

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastsft.models.tokenizer import Tokenizer

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *MARKS]
CORPUS = ["def add(a, b):\n    return a + b\n", "hello world, 1 2 3", "  user assistant", string.printable] * 20
SPACED = ("prepend", "metaspace first", "metaspace always", "byte level with a space", "unigram")


@cache
def family(name: str) -> Tokenizer:
    """With BOS before every text, and <s> and </s> in the model's vocabulary, as Llama's."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trainer: trainers.Trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=SPECIAL, show_progress=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if name == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif name.startswith("metaspace"):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=name.split()[1], split=False)
    elif name == "unigram":
        backend = tokenizers.Tokenizer(models.Unigram())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    else:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=name.endswith("space"))
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=460, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
        )
    backend.train_from_iterator(CORPUS, trainer)
    bos, eos = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return Tokenizer(backend, bos_id=bos, eos_id=eos)
