"""The command line: every verb on tiny data, and one line with exit status 2 for every mistake a user can make."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsft import cli
from fastsft.train import trainer
from fastsft.verbs.console import to_json

Rows = list[dict[str, Any]]


def _write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def _conversations(count: int) -> Rows:
    return [
        {"messages": [{"role": "user", "content": f"say number {i}"}, {"role": "assistant", "content": f"number {i}!"}]}
        for i in range(count)
    ]


def _config(folder: Path, data: Path, **train: Any) -> Path:
    steps = "\n".join(f"{k} = {v}" for k, v in {"max_steps": 2, "tokens_per_batch": 256, **train}.items())
    path = folder / "run.toml"
    path.write_text(
        f"""output = {str(folder / "run")!r}
[model]
dtype = "float32"
[model.init]
model_type = "qwen2"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 32
max_position_embeddings = 256
tie_word_embeddings = true
[tokenizer]
train_vocab = 300
[data]
train = [{str(data)!r}]
max_length = 128
eval_fraction = 0.2
[train]
{steps}
"""
    )
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, run.toml and a trained model in run/model."""
    folder = tmp_path_factory.mktemp("cli")
    cli.main(["train", str(_config(folder, _write(folder / "rows.jsonl", _conversations(40))))])
    return folder


def _json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    capsys.readouterr()
    cli.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The message of a command that must fail with status 2, one line and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, arguments)])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    message = captured.err.strip().splitlines()
    assert len(message) == 1, captured.err
    assert message[0].startswith("fastsft: ")
    return message[0].removeprefix("fastsft: ")


# --- help -----------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom fastsft import cli\ncli.main(['--help'])\ncli.main(['--version'])\n"
        "print([m for m in ('torch', 'numpy', 'tyro', 'pydantic', 'tokenizers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.splitlines()[-1] == "[]"
    for verb in cli.VERBS:
        assert f"\n  {verb} " in out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_each_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"fastsft {verb}" in out
    assert "--json" in out


def test_a_closed_pipe_is_no_error() -> None:
    command = [sys.executable, "-m", "fastsft", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


# --- each verb ------------------------------------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"cpu", "cuda", "ops"} <= _json(capsys, "info").keys()
    cli.main(["info"])
    assert "linear_cross_entropy" in capsys.readouterr().out


def test_dedup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [
        "one two three four five six seven",
        "other words entirely in this one here",
        "one two three four five six seven",
    ]
    source, target, report = (
        _write(tmp_path / "in.jsonl", [{"text": t} for t in texts]),
        tmp_path / "out.jsonl",
        tmp_path / "r.json",
    )
    result = _json(capsys, "dedup", source, "--output", target, "--report", report)
    assert (result["records"], result["kept"], result["exact_duplicates"]) == (3, 2, 1)
    assert target.read_bytes() == b"".join(source.read_bytes().splitlines(keepends=True)[:2])
    assert json.loads(report.read_text()) == result
    target.unlink()
    cli.main(["dedup", str(source), "-o", str(target)])
    assert target.exists()
    capsys.readouterr()
    cli.main(["dedup", str(source), "--mode", "exact"])
    assert "3 records: 2 kept" in capsys.readouterr().out


def test_texts_are_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["dedup", str(_write(tmp_path / "in.jsonl", [{"text": "x [/b] [red]y[/red]"}] * 2))])
    assert "x [/b] [red]y[/red]" in capsys.readouterr().out


def test_prepare(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = _json(capsys, "prepare", trained / "run.toml")
    assert report["train"]["samples"] + report["eval"]["samples"] == report["rows"] == 40
    cli.main(["prepare", str(trained / "run.toml"), "--show", "1"])
    assert "say number 0<|im_end|>\n<|im_start|>assistant\n«number 0!<|im_end|>»\n" in capsys.readouterr().out


def test_shown_samples_are_whole(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "你好 " * 20  # characters of several tokens, on a line longer than a terminal's
    data = _write(tmp_path / "rows.jsonl", [{"text": text}])
    flags = ["--output", tmp_path / "x", "--data", data, "--data.eval-fraction", "0", "--data.max-length", "256"]
    cli.main([*map(str, ("prepare", trained / "run.toml", *flags, "--tokenizer.train-vocab", "262", "--show", "1"))])
    assert f"«{text}<|endoftext|>»" in capsys.readouterr().out


def test_train_again_finds_itself_finished(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = _json(capsys, "train", trained / "run.toml")
    assert result["resumed_from"] == result["steps"] == 2
    assert Path(result["model_path"]) == trained / "run" / "model"
    assert result["tokens_per_second"] is None
    assert result["train_loss"] > 0
    cli.main(["train", str(trained / "run.toml")])
    assert "2 steps, finished before; held-out loss" in capsys.readouterr().out


def test_left_out_rows_are_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = _conversations(30)
    rows[2] = {"text": "number " * 300}
    data = _write(tmp_path / "rows.jsonl", rows)
    with open(data, "a") as stream:
        stream.write("{broken\n")
    long, broken = f"1 x too long, e.g. {data}:3: too long: ", f"1 x broken JSON, e.g. {data}:31: broken JSON: "
    flags = ["--output", tmp_path / "x", "--data", data, "--data.on-bad", "skip"]
    cli.main([*map(str, ("train", trained / "run.toml", *flags))])
    for text in capsys.readouterr():  # before the first step, and with the result
        assert f"left out: {long}" in text
        assert f"left out: {broken}" in text
    report = _json(capsys, "train", trained / "run.toml", *flags)["data"]
    assert report["skipped"] == {"too long": 1, "broken JSON": 1}
    assert report["skipped_examples"]["too long"][0].startswith(f"{data}:3: ")
    cli.main([*map(str, ("dedup", data, "--on-bad", "skip"))])
    assert f"left out: {broken}" in capsys.readouterr().out

    _write(data, rows)
    model = trained / "run" / "model"
    cli.main(["eval", str(model), "--data", str(data)])
    assert f"left out: {long}" in capsys.readouterr().out
    loss = _json(capsys, "eval", model, "--data", data)["loss"]
    assert (loss["rows"], loss["samples"], loss["skipped"]) == (30, 29, {"too long": 1})
    assert loss["skipped_examples"]["too long"][0].startswith(f"{data}:3: ")
    _write(data, rows[2:3])
    assert f"no usable row; left out: {long.replace(':3:', ':1:')}" in _refused(capsys, "eval", model, "--data", data)


@pytest.mark.parametrize(
    ("verb", "after"), [("train", "goes on from the newest checkpoint, if there is one"), ("prepare", "begins anew")]
)
def test_interrupt_is_one_line(
    verb: str, after: str, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        """Stands in for the verb."""
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, verb, (interrupted, True))
    with pytest.raises(SystemExit) as end:
        cli.main([verb, str(trained / "run.toml")])
    assert end.value.code == 130
    message = f"fastsft: interrupted; the same command {after}"
    assert capsys.readouterr().err.strip().splitlines() == [message]


@pytest.mark.parametrize(
    ("verb", "after"), [("train", "goes on from the newest checkpoint, if there is one"), ("demo", "begins anew")]
)
def test_interrupted_training_says_what_the_same_command_does(
    verb: str, after: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def signalled(*args: Any) -> None:
        """Ctrl-C in the first step."""
        if trainer.threading.current_thread() is trainer.threading.main_thread():
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    update = trainer.Trainer._update
    monkeypatch.setattr(trainer.Trainer, "_update", signalled)
    given = [trained / "run.toml", "--output", tmp_path / "x"] if verb == "train" else ["--quick", "--output", tmp_path]
    with pytest.raises(SystemExit) as end:
        cli.main([verb, *map(str, given)])
    assert end.value.code == 130
    error = capsys.readouterr().err
    assert "signal 2: saved step 1 in " in error
    assert error.endswith(f"\nfastsft: interrupted; the same command {after}\n")
    assert error.count("same command") == 1


def test_json_has_no_nan() -> None:
    value = {"a": math.nan, "b": [(math.inf, 1.5)], 1: "NaN"}
    assert json.loads(to_json(value)) == {"a": None, "b": [[None, 1.5]], "1": "NaN"}


def test_a_saved_configuration_runs_again(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = (trained / "run" / "config.json"), tmp_path / "again"
    assert _json(capsys, "train", first, "--output", again)["steps"] == 2
    weights = "model/model.safetensors"
    assert (again / weights).read_bytes() == (trained / "run" / weights).read_bytes()
    (tmp_path / "x.json").write_text("{")
    assert "x.json: not valid JSON" in _refused(capsys, "train", tmp_path / "x.json")


def test_flags_override_the_file(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = _write(tmp_path / "more.jsonl", _conversations(60))
    result = _json(
        capsys, "train", trained / "run.toml", "--output", tmp_path / "x", "--data", more, "--train.max-steps", "1"
    )
    assert result["steps"] == 1
    saved = json.loads((tmp_path / "x" / "config.json").read_text())
    assert saved["data"]["train"] == [str(more)]
    assert saved["tokenizer"]["train_vocab"] == 300  # from the file


def test_generate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained / "run" / "model"
    result = _json(
        capsys,
        "generate",
        model,
        "--prompt",
        "say",
        "--n",
        "2",
        "--temperature",
        "1",
        "--seed",
        "3",
        "--max-tokens",
        "5",
    )
    assert [o["index"] for o in result["outputs"]] == [0, 1]
    assert all(len(o["token_ids"]) <= 5 for o in result["outputs"])
    cli.main(["generate", str(model), "--chat", "say number 3", "--max-tokens", "3"])
    cli.main(["generate", str(model), "--infill", "say", "3", "--max-tokens", "3"])


def test_eval(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained / "run" / "model"
    tasks = _write(tmp_path / "tasks.jsonl", [{"task_id": "a", "prompt": "say", "check": "assert True"},
                                              {"task_id": "b", "prompt": "say", "check": "assert False"}])  # fmt: skip
    result = _json(capsys, "eval", model, "--data", trained / "rows.jsonl", "--tasks", tasks, "--max-tokens", "4")
    assert result["loss"]["samples"] == 40
    assert 3 < result["loss"]["loss"] < 7
    assert 0 <= result["tasks"]["pass_at"]["1"] <= 0.5  # the second check cannot pass
    assert result["tasks"]["tasks"][1]["failure"].startswith("error: ")
    cli.main(["eval", str(model), "--data", str(trained / "rows.jsonl")])
    assert "held-out loss" in capsys.readouterr().out
    cli.main(["eval", str(model), "--tasks", str(tasks), "--max-tokens", "4", "--completion"])
    assert "failed, e.g. " in capsys.readouterr().out


def test_eval_stops_where_told(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = _write(tmp_path / "tasks.jsonl", [{"task_id": "a", "prompt": "say", "check": "", "prefix": "x = 1"}])
    everything = [c for i in range(32, 127) if (c := chr(i)) != "-"]  # so that nothing is left of a sample
    options = ["--completion", "--max-tokens", "4", "--stop", *everything]
    result = _json(capsys, "eval", trained / "run" / "model", "--tasks", tasks, *options)
    assert result["tasks"]["pass_at"]["1"] == 1.0


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert _refused(capsys, "trian") == "unknown verb 'trian'; did you mean 'train'?"
    assert "fastsft --help" in _refused(capsys, "zzz")


def test_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[optim]\nlearning_rate = 1\n[train]\n")
    assert "unknown key 'optim.learning_rate'" in _refused(capsys, "train", path)
    path.write_text("[train]\nmax_step = 1\n")
    assert _refused(capsys, "train", path).endswith("unknown key 'train.max_step'; did you mean 'max_steps'?")
    path.write_text("[train\n")
    assert "not valid TOML" in _refused(capsys, "prepare", path)


def test_missing_files(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = tmp_path / "nowhere.jsonl"
    assert "nowhere.toml: cannot read" in _refused(capsys, "train", tmp_path / "nowhere.toml")
    for command in (
        ("train", trained / "run.toml", "--output", tmp_path / "x", "--data", nowhere),
        ("dedup", nowhere),
        ("eval", trained / "run" / "model", "--data", nowhere),
        ("eval", trained / "run" / "model", "--tasks", nowhere),
    ):
        assert "nowhere.jsonl" in _refused(capsys, *command)
    assert not (tmp_path / "x").exists()


def test_broken_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": "cut off\n')
    for command in (
        ("train", trained / "run.toml", "--output", tmp_path / "x", "--data", broken),
        ("dedup", broken),
        ("eval", trained / "run" / "model", "--data", broken),
    ):
        message = _refused(capsys, *command)
        assert f"{broken}:2: broken JSON" in message
        # Only a setting that the verb has is offered.
        hint = {"train": "data.on_bad = 'skip' would", "dedup": "--on-bad skip would"}.get(command[0])
        assert hint in message if hint else "skip" not in message
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    refused = _refused(capsys, "prepare", trained / "run.toml", "--output", tmp_path / "y", "--data",
                       _write(tmp_path / "calls.jsonl", [{"messages": [message]}]))  # fmt: skip
    assert "calls.jsonl:1: chat template: this template cannot write tool_calls (" in refused
    tasks = tmp_path / "tasks.jsonl"
    for rows, wrong in (([{"task_id": "a"}], "tasks.jsonl:1: expected task_id, prompt and check, found no 'prompt'"),
                        ([7], "tasks.jsonl:1: expected an object"), ([], "tasks.jsonl: no task")):  # fmt: skip
        assert wrong in _refused(capsys, "eval", trained / "run" / "model", "--tasks", _write(tasks, rows))


def test_bad_model_folder(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in _refused(capsys, "generate", tmp_path / "nowhere", "--prompt", "a")
    assert str(tmp_path) in _refused(capsys, "generate", tmp_path, "--prompt", "a")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"')
    assert "config.json" in _refused(capsys, "eval", tmp_path, "--data", trained / "rows.jsonl")
    (tmp_path / "config.json").write_text('{"model_type": "gpt_bigcode"}')
    assert "gpt_bigcode" in _refused(capsys, "generate", tmp_path, "--prompt", "a")


def test_outputs_that_cannot_be(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _write(tmp_path / "in.jsonl", [{"text": "a b"}, {"text": "a b"}])
    before = source.read_bytes()
    (tmp_path / "link.jsonl").hardlink_to(source)
    for flag in ("--output", "--report"):
        assert f"{flag}: expected a file, got the folder" in _refused(capsys, "dedup", source, flag, tmp_path)
        assert f"{flag}: no folder" in _refused(capsys, "dedup", source, flag, tmp_path / "no" / "out.jsonl")
        for same in (source, tmp_path / "link.jsonl", tmp_path / ".." / tmp_path.name / "in.jsonl"):
            assert f"{flag}: expected another file than the input" in _refused(capsys, "dedup", source, flag, same)
    assert source.read_bytes() == before
    for verb in ("train", "prepare"):
        for output in (source, source / "run"):
            message = _refused(capsys, verb, trained / "run.toml", "--output", output)
            assert message.startswith("output: expected a folder, got ")
    assert "expected a new or empty folder" in _refused(capsys, "demo", "--output", source)
    assert _refused(capsys, "eval", trained / "run" / "model", "--tasks", tmp_path) == f"{tmp_path}: Is a directory"


def test_dedup_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _write(tmp_path / "in.jsonl", [{"content": "a b"}, {"content": "a b"}])
    target = tmp_path / "out.jsonl"
    for options in ([], ["--output", target]):
        assert _json(capsys, "dedup", source, "--fields", "text", "content", *options)["kept"] == 1
    assert target.read_bytes() == source.read_bytes()[: source.stat().st_size // 2]
    cli.main(["dedup", str(target), "--fields", "text", "content"])
    shown = capsys.readouterr()
    assert shown.out == "1 records: 1 kept, 0 exact and 0 near duplicates\n"  # no empty table
    assert shown.err == ""
    message = _refused(capsys, "dedup", source, "--fields", "txt", "content")
    assert message == "dedup: unknown key 'fields.txt'; did you mean 'text'?"
    for threshold in ("0", "1.5", "nan"):
        message = _refused(capsys, "dedup", source, "--fields", "text", "content", "--threshold", threshold)
        assert "threshold: expected a number above 0 and at most 1, got" in message


def test_impossible_requests(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained / "run" / "model"
    assert "exactly one of" in _refused(capsys, "generate", model)
    assert "--data, --tasks" in _refused(capsys, "eval", model)
    for k in ("0", "2"):
        refused = _refused(capsys, "eval", model, "--tasks", trained / "rows.jsonl", "--k", k)
        assert refused == f"eval: --k: expected numbers from 1 to --n, 1, got {k}"
    assert _refused(capsys, "generate", trained / "run", "--prompt", "a").endswith(f"its model is {model}")
    assert "temperature" in _refused(capsys, "generate", model, "--prompt", "a", "--temperature", "-1")
    assert "model.path" in _refused(capsys, "train")
    assert "data.train" in _refused(capsys, "prepare")
    assert "--show" in _refused(capsys, "prepare", trained / "run.toml", "--show")
    assert "--show" in _refused(capsys, "prepare", trained / "run.toml", "--show", "many")
