"""Infilling in one pass over a text's own ids: sample by sample what its pieces, encoded one by one, give."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from fastsft.config import Config, load_config
from fastsft.data import tokenise as module
from fastsft.data.batch import Sample
from fastsft.data.notices import notices
from fastsft.data.prepare import prepare
from fastsft.data.records import Problems, Record
from fastsft.data.tokenise import tokenise
from fastsft.models.fim import FORMATS
from fastsft.models.tokenizer import Tokenizer

CODE = Path(__file__).read_text()
QWEN = Tokenizer.train([CODE], 700, FORMATS["qwen"].tokens)


def with_bos() -> Tokenizer:
    """Of DeepSeek's kind: one order, and a BOS before every text."""
    found = Tokenizer.train([CODE], 700, FORMATS["deepseek"].tokens)
    found.backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", found.eos_id)]
    )
    return found


def with_added() -> Tokenizer:
    """One token that is neither special nor a plain piece of text."""
    found = Tokenizer.train([CODE], 700, FORMATS["qwen"].tokens)
    found.backend.add_tokens(["assert"])
    return found


TOKENIZERS = {"qwen": QWEN, "bos": with_bos(), "added": with_added()}


def texts(count: int) -> list[Record]:
    """Source, words with accents, composed or not, markers in the content, a long run, and nothing."""
    rng = random.Random(0)
    lines = CODE.splitlines(keepends=True)
    odd = ["", "x", "e\u0301te\u0301 " * 3, "h\u00e9llo w\u00f6rld\n" * 4, "日本語 \U0001f600 x\r\n"]
    odd += ["<|fim_middle|> = 1\n", "a" * 2500]
    found = []
    for i in range(count):
        begin = rng.randrange(len(lines))
        text = rng.choice(odd) if i % 4 == 0 else "".join(lines[begin : begin + rng.randint(1, 30)])
        found.append(Record("text", f"x:{i}", parts=(text,), weight=rng.choice([1.0, 0.5])))
    return found


def config_of(**fim: object) -> Config:
    data = {"train": ["x"], "max_length": 2048, "on_long": "truncate", "fim": {"rate": 0.7, **fim}}
    return load_config({"seed": 3, "data": data, "train": {"tokens_per_batch": 4096}})


def samples(config: Config, tokenizer: Tokenizer, records: list[Record]) -> tuple[list[Sample], Counter[str], Problems]:
    counts, problems = Counter[str](), Problems("skip")
    return list(tokenise(records, tokenizer, config, problems, first=40, infilled=counts)), counts, problems


@pytest.mark.parametrize("spans", ["char", "line", "syntax", "token", "tree_sitter"])
@pytest.mark.parametrize("max_length", [30, 2048])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_both_ways_give_the_same_samples(
    name: str, max_length: int, spans: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spans == "tree_sitter":
        pytest.importorskip("tree_sitter_python")
    import dataclasses

    config = config_of(spans=spans)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=max_length))
    records = texts(160)
    found, counts, problems = samples(config, TOKENIZERS[name], records)
    monkeypatch.setattr(module, "_rearranged", lambda *args: {})
    expected, others, same = samples(config, TOKENIZERS[name], records)
    assert problems == same
    assert [s.source for s in found] == [s.source for s in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist(), ours.source
        assert np.array_equal(ours.weights, theirs.weights), ours.source
        assert ours.ids.dtype == theirs.ids.dtype == np.int32
    assert others["fim_rows"] == 0
    assert counts["fim_rows"] + counts["pieces"] == others["pieces"] > 80
    assert counts["pieces"] > 0, "what is not in its normal form, or one long run"
    assert counts["fim_rows"] > (20 if name == "added" else 60)


def test_the_report_says_which_way_served(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"x = {i}\n" * 5} for i in range(30)] + [
        {"text": "e\u0301" * 9},
        {"prompt": "a", "completion": "b"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(tokenizer: str) -> Config:
        data = {"train": [str(path)], "eval_fraction": 0.0, "fim": {"rate": 1.0}}
        return load_config({"output": str(tmp_path / "run"), "tokenizer": {"path": tokenizer}, "data": data})

    for name in ("native", "other"):
        (tmp_path / name).mkdir()
        QWEN.save(tmp_path / name)
    found = prepare(config(str(tmp_path / "native"))).report
    assert found["infilling"] == {"texts": 31, "fim_rows": 30, "pieces": 1, "why_pieces": None}
    assert "infilling: 1 of 31 texts cut and encoded piece by piece: not in the normal form, " in "\n".join(
        notices(found)
    )
    spec = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "NFKC"}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(spec))
    found = prepare(config(str(tmp_path / "other"))).report
    assert found["infilling"] == {"texts": 31, "fim_rows": 0, "pieces": 31, "why_pieces": "the normaliser is NFKC"}
    line = "infilling: 31 of 31 texts cut and encoded piece by piece: the normaliser is NFKC"
    assert line in notices(found)
