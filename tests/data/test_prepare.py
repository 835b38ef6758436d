"""From files to stores: what is reused, what is left out and reported, what is held out."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsft.config import Config, ConfigError, load_config
from fastsft.data import prepare as module
from fastsft.data.notices import notices
from fastsft.data.prepare import Prepared, prepare
from fastsft.data.records import DataError, Record
from fastsft.data.selection import held_out
from fastsft.models.fim import Fim
from fastsft.models.template import CHATML
from fastsft.models.tokenizer import Tokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


def texts(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"text": " ".join(rng.choices(WORDS, k=rng.randint(9, 14)))} for _ in range(count)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def config_of(tmp_path: Path, *train: Path, **data: Any) -> Config:
    if not (tmp_path / "tok").exists():
        (tmp_path / "tok").mkdir()
        Tokenizer.train(WORDS * 9, 320, ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]).save(tmp_path / "tok")
    return load_config(
        {
            "output": str(tmp_path / "run"),
            "tokenizer": {"path": str(tmp_path / "tok")},
            "data": {"train": [str(t) for t in train], "max_length": 64, "eval_fraction": 0.0, **data},
            "train": {"tokens_per_batch": 64},
        }
    )


def ids(prepared: Prepared, part: str = "train") -> list[list[int]]:
    store = getattr(prepared, part)
    return [store[i].ids.tolist() for i in range(len(store))]


# --- reuse ----------------------------------------------------------------------------------------------------------


def test_same_inputs_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "a.jsonl", texts(20))
    config = config_of(tmp_path, path, eval_fraction=0.3)
    first = prepare(config)

    def unexpected(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the files were read again")

    monkeypatch.setattr(module, "read_records", unexpected)
    second = prepare(config)
    assert second.report == first.report
    assert ids(second) == ids(first)
    assert ids(second, "eval") == ids(first, "eval")
    assert second.tokenizer.files == first.tokenizer.files


@pytest.mark.parametrize(
    "change", ["a byte", "order", "tokenizer", "seed", "max_length", "fim", "moved line", "file name"]
)
def test_anything_that_matters_is_never_stale(change: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = texts(12)
    jsonl(folder / "a.jsonl", rows[:6])
    jsonl(folder / "b.jsonl", rows[6:])
    held_out = jsonl(tmp_path / "eval.jsonl", texts(3, 1))
    options: dict[str, Any] = {"eval": [str(held_out)]}
    first = prepare(config_of(tmp_path, folder, **options))
    config = config_of(tmp_path, folder, **options)
    if change == "a byte":
        (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text().replace("alpha", "alphA", 1))
    elif change == "order":
        jsonl(folder / "a.jsonl", rows[:6][::-1])
    elif change == "tokenizer":
        Tokenizer.train(["alpha beta"] * 9, 300, ["<|fim_prefix|>"]).save(tmp_path / "tok")
    elif change == "moved line":  # from the end of the training files to the start of the evaluation file
        line = (folder / "b.jsonl").read_text().splitlines(keepends=True)
        (folder / "b.jsonl").write_text("".join(line[:-1]))
        held_out.write_text(line[-1] + held_out.read_text())
    elif change == "file name":  # no longer a data file
        (folder / "b.jsonl").rename(folder / "b.txt")
    elif change == "seed":
        config = load_config({"seed": 1, **_plain(config)})
    elif change == "max_length":
        config = config_of(tmp_path, folder, max_length=20, **options)
    else:
        config = config_of(tmp_path, folder, fim={"rate": 1.0}, **options)
    second = prepare(config)
    assert second.report["key"] != first.report["key"]
    fresh = load_config({**_plain(config), "seed": config.seed, "output": str(tmp_path / "fresh")})
    assert ids(second) == ids(prepare(fresh))
    if change != "seed":
        assert ids(second) != ids(first)


def _plain(config: Config) -> dict[str, Any]:
    from fastsft.config import to_dict

    return {k: v for k, v in to_dict(config).items() if k != "seed"}


# --- what is left out -----------------------------------------------------------------------------------------------

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
UNANSWERED = {"messages": [{"role": "user", "content": "q"}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (UNANSWERED, "nothing to train on"),
        ({"text": "x", "weight": 0}, "nothing to train on"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "chat template"),
        ({"messages": []}, "empty conversation"),
        ("{broken", "broken JSON"),
    ],
)
def test_unusable_row_is_reported_with_its_place(row: Any, reason: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [CHAT, row, CHAT])
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {reason}"):
        prepare(config_of(tmp_path, path))
    prepared = prepare(config_of(tmp_path, path, max_bad=1.0))
    assert prepared.report["skipped"] == {reason: 1}
    assert prepared.report["skipped_examples"][reason][0].startswith(f"{path}:2: {reason}")
    assert prepared.report["rows"] == 3
    assert [prepared.train[i].source for i in range(2)] == [f"{path}:1", f"{path}:3"]
    json.dumps(prepared.report)


LONG = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "alpha beta " * 40}]}
DROPPED = {"messages": [*CHAT["messages"], *CHAT["messages"]]}  # the template below forgets the first answer
FORGETFUL = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if m.role == 'user' or loop.last else '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (UNANSWERED, "nothing to train on"),
        (LONG, "truncated answer"),
        ({"prompt": "q", "completion": "alpha beta " * 40}, "truncated answer"),
        ({"messages": [{"role": "system", "content": "!"}, *CHAT["messages"]]}, "double BOS"),
        (DROPPED, "prompt is not a prefix"),
    ],
)
def test_what_spoils_a_sample_is_fatal_above_its_share(row: Any, reason: str, tmp_path: Path) -> None:
    """Counted, listed, left out, and the end of the run where there are more of them than allowed."""
    path = jsonl(tmp_path / "a.jsonl", [CHAT, CHAT, row, *[CHAT] * 16, row])
    config_of(tmp_path, path)  # writes the tokenizer
    settings = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    if reason == "double BOS":
        settings["bos_token"] = "<|im_start|>"
        settings["chat_template"] = "{% if messages[0].role == 'system' %}{{ bos_token }}{% endif %}" + CHATML
    elif reason == "prompt is not a prefix":
        settings["chat_template"] = FORGETFUL
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=rf"a\.jsonl:3: {reason}"):
        prepare(config_of(tmp_path, path, on_long="truncate"))
    prepared = prepare(config_of(tmp_path, path, on_long="truncate", max_bad=0.1))
    assert prepared.report["skipped"][reason] == 2
    assert [p.split(": ")[1] for p in prepared.report["skipped_examples"][reason]] == [reason] * 2
    assert f"left out: 2 x {reason}, e.g. {path}:3: {reason}" in "\n".join(notices(prepared.report))
    assert len(prepared.train) == 18
    with pytest.raises(DataError, match=rf"2 of 20 rows are unusable, data\.max_bad allows 0\.05.*2 x {reason}"):
        prepare(config_of(tmp_path, path, on_long="truncate", max_bad=0.05))


def test_a_conversation_may_lose_whole_turns(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": turns * 2}])
    whole = prepare(config_of(tmp_path, path)).train
    first, full = len(whole[0].ids), len(whole[1].ids)
    kept, refused = 0, 0
    for limit in range(first, full + 1):
        prepared = prepare(config_of(tmp_path, path, on_long="truncate", max_length=limit, max_bad=0.5))
        refused += prepared.report["skipped"].get("truncated answer", 0)
        for sample in (prepared.train[i] for i in range(1, len(prepared.train))):
            kept += 1
            assert sample.ids.tolist() == whole[1].ids[:limit].tolist()
            last = np.flatnonzero(sample.weights > 0)[-1]
            assert prepared.tokenizer.decode([sample.ids[last]], False) == "<|im_end|>"
    assert kept
    assert refused
    assert kept + refused == full + 1 - first


def test_no_usable_row_at_all(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [UNANSWERED] * 3)
    with pytest.raises(DataError, match=r"no usable row; 3 x nothing to train on\. .*a\.jsonl:1"):
        prepare(config_of(tmp_path, path, max_bad=1.0))
    with pytest.raises(DataError, match="no usable row; the files are empty"):
        prepare(config_of(tmp_path, jsonl(tmp_path / "b.jsonl", [])))


@pytest.mark.parametrize("mode", ["fail", "skip", "truncate"])
def test_long_rows(mode: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "alpha"}, {"text": "beta gamma " * 40}])
    config = config_of(tmp_path, path, on_long=mode, max_length=10)
    if mode == "fail":
        with pytest.raises(DataError, match=r"a\.jsonl:2: too long: \d+ tokens, data\.max_length is 10"):
            prepare(config)
        return
    prepared = prepare(config)
    assert prepared.train.lengths.max() <= 10
    if mode == "skip":
        assert prepared.report["skipped"] == {"too long": 1}
        assert len(prepared.train) == 1
    else:
        assert prepared.train.lengths.tolist()[1] == 10
        assert prepared.train[1].ids.tolist() == prepared.tokenizer.encode("beta gamma " * 40)[:10]


def test_a_sample_may_have_exactly_the_longest_length(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a b c d e f g h"}])
    length = int(prepare(config_of(tmp_path, path)).train.lengths[0])
    assert len(prepare(config_of(tmp_path, path, max_length=length)).train) == 1
    with pytest.raises(DataError, match="no usable row; 1 x too long"):
        prepare(config_of(tmp_path, path, max_length=length - 1))


def test_double_bos_is_refused(tmp_path: Path) -> None:
    config_of(tmp_path, tmp_path)  # writes the tokenizer
    settings = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    settings["bos_token"], settings["chat_template"] = "<|im_start|>", "{{ bos_token }}" + CHATML
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"a\.jsonl:1: double BOS"):
        prepare(config_of(tmp_path, jsonl(tmp_path / "a.jsonl", [CHAT])))


def test_missing_files_and_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train: expected at least one file"):
        prepare(config_of(tmp_path))
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        prepare(config_of(tmp_path, tmp_path / "none.jsonl"))
    path = jsonl(tmp_path / "a.jsonl", texts(2))
    with pytest.raises(ConfigError, match=r"give tokenizer\.path, tokenizer\.train_vocab or model\.path"):
        prepare(load_config({"output": str(tmp_path / "x"), "data": {"train": [str(path)]}}))


# --- duplicates, split, infilling -----------------------------------------------------------------------------------


def test_duplicates_are_counted(tmp_path: Path) -> None:
    base = texts(10)
    near = {"text": base[0]["text"] + " " + " ".join(WORDS)}
    path = jsonl(tmp_path / "a.jsonl", [*base, base[3], base[3], base[5], near])
    exact = prepare(config_of(tmp_path, path, dedup={"mode": "exact"}))
    assert exact.report["dedup"]["exact_duplicates"] == 3
    assert exact.report["dedup"]["near_duplicates"] == 0
    assert exact.report["rows"] == 14
    assert len(exact.train) == 11
    loose = prepare(config_of(tmp_path, path, dedup={"mode": "near", "threshold": 0.2}))
    assert loose.report["dedup"]["kept"] == len(loose.train) <= 10


def test_split_is_by_text_and_deterministic(tmp_path: Path) -> None:
    rows = [Record("text", f"x:{i}", parts=(f"text {i // 2}",)) for i in range(4000)]
    held = held_out(rows, 0.1, 7)
    assert abs(held.sum() - 400) < 5 * (2 * 4000 * 0.1 * 0.9) ** 0.5
    assert np.array_equal(held[::2], held[1::2]), "equal texts on both sides"
    assert np.array_equal(held, held_out(rows, 0.1, 7))
    assert not np.array_equal(held, held_out(rows, 0.1, 8))
    assert not (held & ~held_out(rows, 0.3, 7)).any(), "a larger part has all of a smaller one"
    assert np.array_equal(held_out(rows[::-1], 0.1, 7)[::-1], held)
    path = jsonl(tmp_path / "a.jsonl", texts(60))
    prepared = prepare(config_of(tmp_path, path, eval_fraction=0.3))
    assert len(prepared.train) + len(prepared.eval) == 60
    assert len(prepared.eval) > 5


def test_infilling_rate_and_samples(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", texts(200))
    prepared = prepare(config_of(tmp_path, path, fim={"rate": 0.5}))
    mark = prepared.tokenizer.token_id("<|fim_middle|>")
    count = sum(mark in sample for sample in ids(prepared))
    assert abs(count - 100) < 5 * 50**0.5
    assert ids(prepared) == ids(prepare(config_of(tmp_path, path, fim={"rate": 0.5})))
    weights = np.concatenate([prepared.train[i].weights for i in range(200)])
    assert (weights == 1).all()
    with pytest.raises(ValueError, match=r"data\.fim\.markers: '<PRE>' is not a token of this vocabulary"):
        prepare(config_of(tmp_path, path, fim={"rate": 0.5, "markers": ["<PRE>", "<SUF>", "<MID>"]}))
    with pytest.raises(ValueError, match=r"data\.fim\.format 'deepseek': .* is not a token of this vocabulary"):
        prepare(config_of(tmp_path, path, fim={"rate": 0.5, "format": "deepseek"}))


def test_tokenizer_trained_on_the_texts(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", texts(50))
    raw = {"output": str(tmp_path / "run"), "tokenizer": {"train_vocab": 300}, "data": {"train": [str(path)]}}
    stages: list[str] = []
    first = prepare(load_config(raw), progress=lambda stage, done, total: stages.append(stage))
    again = prepare(load_config({**raw, "output": str(tmp_path / "other")}))
    assert first.tokenizer.files == again.tokenizer.files
    assert len(first.tokenizer.encode("alpha")) == 1
    assert first.tokenizer.token_id("<|fim_prefix|>") is not None
    assert {"reading", "training tokenizer", "tokenising train"} <= set(stages)


def test_a_config_object_is_validated(tmp_path: Path) -> None:
    config = config_of(tmp_path, jsonl(tmp_path / "a.jsonl", texts(2)))
    wrong: Any = dataclasses.replace(config.data, on_long="cut")
    with pytest.raises(ConfigError, match=r"data\.on_long: .* got 'cut'"):
        prepare(dataclasses.replace(config, data=wrong))


@pytest.mark.parametrize(("name", "order"), [("deepseek", "psm"), ("codestral", "spm"), ("qwen", None)])
def test_a_format_with_one_order_is_told(tmp_path: Path, name: str, order: str | None) -> None:
    path = jsonl(tmp_path / "a.jsonl", texts(20))
    raw = {
        "output": str(tmp_path / "run"), "tokenizer": {"train_vocab": 400},
        "data": {"train": [str(path)], "fim": {"rate": 1.0, "format": name}},
    }  # fmt: skip
    prepared = prepare(load_config(raw))
    line = f"without effect: data.fim.spm_rate = 0.5; this format has the order {order} alone"
    assert (line in notices(prepared.report)) is (order is not None)
    fim = Fim.find(prepared.tokenizer)
    assert all(fim.inverse(sample) is not None for sample in ids(prepared))
