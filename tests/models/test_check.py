"""A sound folder passes; each thing that can be wrong with one is the finding that fails, and the only one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_table import CASES, reference
from test_tokenizer import trained
from weights_cases import edited

from fastsft.models import check
from fastsft.models.check import check_folder
from fastsft.models.decoder import Decoder
from fastsft.models.weights import load_model

pytest.importorskip("transformers")


def model_folder(folder: Path, case: str = "qwen2 tied GQA", **keys: Any) -> Path:
    tokenizer = trained()
    given = {**CASES[case], "vocab_size": tokenizer.vocab_size, **keys}
    reference(given).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def failed(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    return {f.what: f.detail for f in check_folder(folder, dtype=dtype) if f.ok is False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama untied GQA", "qwen2 tied GQA", "qwen3 untied MHA", "mistral window 7"])
def test_a_sound_folder(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    findings = check_folder(model_folder(tmp_path, case), dtype=dtype)
    assert [f.what for f in findings] == [
        "loads here", "loads in transformers", "logits", "tokenizer", "ids of texts", "texts of ids", "texts come back",
        "chat template", "end tokens",
    ]  # fmt: skip
    assert all(f.ok for f in findings), findings
    assert findings[-1].detail == "<|endoftext|>, <|im_end|>"


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.002), (torch.bfloat16, 1.5)])
def test_other_logits(dtype: torch.dtype, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if one of two loaders had read one matrix in another way."""

    def off(folder: Path, *, dtype: torch.dtype) -> Decoder:
        model = load_model(folder, dtype=dtype)
        with torch.no_grad():
            model.get_submodule("layers.2.mlp.down_proj").weight.mul_(scale)
        return model

    monkeypatch.setattr(check, "load_model", off)
    found = failed(model_folder(tmp_path), dtype)
    assert list(found) == ["logits"]
    assert "largest difference" in found["logits"]


def test_not_a_number_is_no_agreement(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    edited(folder, lambda t: t["model.norm.weight"].fill_(float("nan")))
    assert list(failed(folder)) == ["logits"]


def test_missing_weights(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    edited(folder, lambda t: t.pop("model.norm.weight"))
    found = failed(folder)
    assert "missing: model.norm.weight" in found.pop("loads here")
    assert "missing keys: model.norm.weight" in found.pop("loads in transformers")
    assert not found


def test_tokenizers(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, vocab_size=trained().vocab_size - 8)
    assert failed(folder) == {"tokenizer": "ValueError: ids below 1200, but the model has 1192 tokens"}
    (folder / "tokenizer.json").write_text("{}")
    assert "not a tokenizer" in failed(folder)["tokenizer"]
    (folder / "tokenizer.json").unlink()
    assert not failed(folder)
    assert [f.ok for f in check_folder(folder)] == [True, True, True, None]


def test_a_tokenizer_that_transformers_builds_anew(tmp_path: Path) -> None:
    """For qwen2 it does not read the file's normaliser: a folder that relies on another one is read differently."""
    folder = model_folder(tmp_path, "qwen2 tied GQA")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "Qwen2Tokenizer"}))
    assert {"ids of texts", "texts come back"} <= failed(folder).keys()


@pytest.mark.parametrize(
    ("template", "message"),
    [("{{ raise_exception('no turns') }}", "no turns"), ("{{ messages[0].content | nonsense }}", "nonsense")],
)
def test_templates(template: str, message: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    found = failed(folder)
    assert list(found) == ["chat template"]
    assert message in found["chat template"]


def test_what_a_folder_may_lack(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    findings = {f.what: f for f in check_folder(folder)}
    assert findings["chat template"].ok is None
    assert findings["end tokens"].ok is None
    assert not any(f.ok is False for f in findings.values())


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="check: dtype: expected float32 or bfloat16"):
        check_folder(tmp_path, dtype=torch.float16)
