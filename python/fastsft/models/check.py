"""Is a model folder what others will read? What transformers makes of it, beside what is made of it here.

The texts and ids that are compared are generated here, so that nothing but the folder is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastsft.models.attend import VarlenAttend
from fastsft.models.tokenizer import Tokenizer
from fastsft.models.weights import load_model

# Of the largest logit. Two orders of summation differ by about 1e-6 in float32; bfloat16 rounds every layer's output to
# 8 bits, by other amounts in each of two implementations.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}
_LENGTHS = (97, 1, 30)

_TEXTS = (
    "def f(x, y=12):\n    return x[:98] + 3.14159e-07\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { sum += a[i] * 1_000; } // don't\r\n",
    "naïve café, 你好 世界, 👩🏽\u200d💻 ²",
)
_CHAT = [
    {"role": "user", "content": "Write a function `add(a, b)`."},
    {"role": "assistant", "content": "def add(a, b):\n    return a + b"},
    {"role": "user", "content": "And `sub`?"},
]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``ok`` is None where the folder has nothing to look at."""

    what: str
    ok: bool | None
    detail: str


def check_folder(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> list[Finding]:
    """Load a folder here and in transformers, and compare what comes out.

    One model is in memory at a time. What is wrong with the folder does not raise: it is the finding, and what depends
    on it is left out.

    Args:
        dtype: what both compute in: float32 or bfloat16.

    Returns:
        Findings, in order: the folder loads here; in transformers, with every weight in its place; the logits of packed
        random ids are within ``TOLERANCES[dtype]`` of the largest; the tokenizer loads and has no more tokens than the
        model; ids of texts and texts of ids; what the chat template writes, and its ids; the tokens that end a
        generation.

    Raises:
        ImportError: transformers is not installed. ValueError: another dtype.
    """
    import transformers  # noqa: F401 (missing, it is no finding)

    if dtype not in TOLERANCES:
        raise ValueError(f"check: dtype: expected float32 or bfloat16, got {dtype}")
    folder = Path(path)
    findings: list[Finding] = []
    documents, ours = _guarded(findings, "loads here", lambda: _our_logits(folder, dtype)) or ([], [])
    reading: Any = _guarded(findings, "loads in transformers", lambda: _their_model(folder, dtype))
    if ours and reading is not None:
        findings.append(_compare_logits(ours, reading, documents, dtype))
    generation = None if reading is None else reading.generation_config.eos_token_id
    del reading
    _check_tokenizer(findings, folder, ours[0].shape[-1] if ours else None, generation)
    return findings


def _guarded(findings: list[Finding], what: str, load: Callable[[], tuple[str, Any]]) -> Any:
    """The second of what ``load`` returns, the first is what to tell of it; None if it failed, which is a finding."""
    try:
        detail, value = load()
    except Exception as error:  # whatever stops it is what a user of the folder would see
        findings.append(Finding(what, False, f"{type(error).__name__}: {error}"))
        return None
    findings.append(Finding(what, True, detail))
    return value


@torch.no_grad()
def _our_logits(folder: Path, dtype: torch.dtype) -> tuple[str, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Random documents, and the logits of each from one packed pass."""
    model = load_model(folder, dtype=dtype)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    lengths = [min(n, config.max_position_embeddings) for n in _LENGTHS]
    documents = [torch.randint(config.vocab_size, (n,), generator=generator) for n in lengths]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    hidden = model(torch.cat(documents), positions, VarlenAttend(cu_seqlens))
    logits = F.linear(hidden, model.lm_head_weight)
    parameters = sum(p.numel() for p in model.parameters())
    return f"{config.model_type}, {parameters:,} parameters", (documents, list(torch.split(logits, lengths)))


def _their_model(folder: Path, dtype: torch.dtype) -> tuple[str, Any]:
    import transformers

    loader: Any = transformers.AutoModelForCausalLM
    model, info = loader.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    wrong = [f"{kind.replace('_', ' ')}: {', '.join(map(str, names))}" for kind, names in info.items() if names]
    if wrong:
        raise ValueError("; ".join(wrong)[:500])
    return f"{type(model).__name__}, transformers {transformers.__version__}", model.eval()


@torch.no_grad()
def _compare_logits(ours: list[torch.Tensor], model: Any, documents: list[torch.Tensor], dtype: torch.dtype) -> Finding:
    theirs = torch.cat([model(d[None], use_cache=False).logits[0] for d in documents]).float()
    found = torch.cat(ours).float()
    largest, off = float(theirs.abs().max()), float((found - theirs).abs().max())
    bound = TOLERANCES[dtype] * largest
    same = int((found.argmax(-1) == theirs.argmax(-1)).sum())
    detail = (
        f"largest difference {off:.2g} of {largest:.3g}, up to {bound:.2g} is rounding in "
        f"{str(dtype).removeprefix('torch.')}; the same token is on top in {same} of {len(theirs)} positions"
    )
    return Finding("logits", off <= bound, detail)  # False for NaN


def _check_tokenizer(
    findings: list[Finding], folder: Path, vocabulary: int | None, ends: int | list[int] | None
) -> None:
    """``vocabulary``: the model's; ``ends``: what transformers' generation stops at."""
    import transformers

    def load() -> tuple[str, tuple[Tokenizer, Any]]:
        ours = Tokenizer.from_folder(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if vocabulary is not None and ours.vocab_size > vocabulary:
            raise ValueError(f"ids below {ours.vocab_size}, but the model has {vocabulary} tokens")
        return f"{type(theirs).__name__}, {ours.vocab_size:,} tokens", (ours, theirs)

    if not (folder / "tokenizer.json").is_file():
        findings.append(Finding("tokenizer", None, "the folder has no tokenizer.json"))
        return
    both = _guarded(findings, "tokenizer", load)
    if both is None:
        return
    ours, theirs = both
    ids = [ours.encode(text) for text in _TEXTS]
    texts = [ours.decode(i) for i in ids]
    findings += [
        _compare("ids of texts", _TEXTS, ids, [theirs.encode(t, add_special_tokens=False) for t in _TEXTS]),
        _compare("texts of ids", _TEXTS, texts, [theirs.decode(i, skip_special_tokens=True) for i in ids]),
        _compare("texts come back", _TEXTS, texts, _TEXTS),
        _check_template(ours, theirs),
    ]
    listed = [] if ends is None else ends if isinstance(ends, list) else [ends]
    tokens = [ours.backend.id_to_token(i) for i in listed]
    told = ", ".join(map(str, tokens)) or "none: transformers' generation ends at its length only"
    findings.append(Finding("end tokens", None not in tokens if tokens else None, told))


def _check_template(ours: Tokenizer, theirs: Any) -> Finding:
    if ours.chat_template is None:
        return Finding("chat template", None, "the folder has none")
    forms = [(_CHAT, True), (_CHAT[:2], False)]
    shown = [f"{len(messages)} messages" for messages, _ in forms]

    def compare() -> Finding:
        written = [ours.render_chat(m, add_generation_prompt=g) for m, g in forms]
        expected = [theirs.apply_chat_template(m, tokenize=False, add_generation_prompt=g) for m, g in forms]
        ids = [ours.encode_chat(m, add_generation_prompt=g) for m, g in forms]
        encodings = [theirs.apply_chat_template(m, add_generation_prompt=g, return_dict=True) for m, g in forms]
        finding = _compare("chat template", shown, written, expected)
        return _compare("chat template", shown, ids, [e["input_ids"] for e in encodings]) if finding.ok else finding

    failed: list[Finding] = []
    found: Finding | None = _guarded(failed, "chat template", lambda: ("", compare()))
    return found or failed[0]


def _compare(what: str, given: Sequence[str], ours: Sequence[Any], expected: Sequence[Any]) -> Finding:
    for text, a, b in zip(given, ours, expected, strict=True):
        if a != b:
            return Finding(what, False, f"{text!r:.60}: {a!r:.200} here, expected {b!r:.200}")
    return Finding(what, True, f"equal in {len(given)} of {len(given)}")
