"""One line and exit status 2 for every mistake a user can make."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_cases import refusal, write

from fastsft import cli

SYNTAX = (
    "prepare", "run.toml", "--data", "rows.jsonl", "--data.fim.rate", "1", "--data.fim.spans", "tree_sitter",
    "--data.fim.markers", "<|endoftext|>", "<|im_start|>", "<|im_end|>",
)  # fmt: skip


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "trian") == "unknown verb 'trian'; did you mean 'train'?"
    assert "fastsft --help" in refusal(capsys, "zzz")


def test_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[optim]\nlearning_rate = 1\n[train]\n")
    assert "unknown key 'optim.learning_rate'" in refusal(capsys, "train", path)
    path.write_text("[train]\nmax_step = 1\n")
    assert refusal(capsys, "train", path).endswith("unknown key 'train.max_step'; did you mean 'max_steps'?")
    path.write_text("[train\n")
    assert "not valid TOML" in refusal(capsys, "prepare", path)


def test_missing_files(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = tmp_path / "nowhere.jsonl"
    assert "nowhere.toml: cannot read" in refusal(capsys, "train", tmp_path / "nowhere.toml")
    for command in (
        ("train", trained / "run.toml", "--output", tmp_path / "x", "--data", nowhere),
        ("dedup", nowhere),
        ("eval", trained / "run" / "model", "--data", nowhere),
        ("eval", trained / "run" / "model", "--tasks", nowhere),
    ):
        assert "nowhere.jsonl" in refusal(capsys, *command)
    assert not (tmp_path / "x").exists()


def test_what_comes_twice_or_not_at_all(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tasks = trained / "run" / "model", tmp_path / "tasks.jsonl"
    message = refusal(capsys, "serve", model, "--adapters", "a=x", "a=y")
    assert message == "serve: --adapters: expected different names, got 'a' twice"
    tasks.write_text('{"task_id": 1, "prompt": "", "check": ""}\n')
    for command in (("eval", model, "--tasks", tasks), ("sample", model, tasks, "--output", tmp_path / "x")):
        assert refusal(capsys, *command, "--workers", "-1") == "workers: expected at least 1, got -1"


def test_broken_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": "cut off\n')
    for command in (
        ("train", trained / "run.toml", "--output", tmp_path / "x", "--data", broken),
        ("dedup", broken),
        ("eval", trained / "run" / "model", "--data", broken),
    ):
        message = refusal(capsys, *command)
        assert f"{broken}:2: broken JSON: unexpected control character in string at character 18" in message
        # Only a setting that the verb has is offered.
        hint = {"train": "data.max_bad above 0 would", "dedup": "--on-bad skip would"}.get(command[0])
        assert hint in message if hint else "skip" not in message
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    refused = refusal(capsys, "prepare", trained / "run.toml", "--output", tmp_path / "y", "--data",
                       write(tmp_path / "calls.jsonl", [{"messages": [message]}]))  # fmt: skip
    assert "calls.jsonl:1: chat template: this template cannot write tool_calls (" in refused
    tasks = tmp_path / "tasks.jsonl"
    for rows, wrong in (([{"task_id": "a"}], "(each with input and output) or test and entry_point, found no 'prompt'"),
                        ([7], "tasks.jsonl:1: expected an object"), ([], "tasks.jsonl: no task")):  # fmt: skip
        assert wrong in refusal(capsys, "eval", trained / "run" / "model", "--tasks", write(tasks, rows))


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("pyarrow", "data", ("dedup", "rows.parquet")),
        ("pyarrow", "data", ("dedup", "rows.jsonl.zst")),
        ("datasets", "data", ("prepare", "run.toml", "--data", "saved")),
        ("tree_sitter", "data", SYNTAX),
        ("tree_sitter_python", "data", SYNTAX),
        ("ray", "ray", ("dedup", "rows.jsonl", "--engine", "ray", "--work", "work")),
        ("uvicorn", "serve", ("serve", "model")),
        ("fastapi", "serve", ("serve", "model")),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    package: str, extra: str, command: tuple[str, ...], tmp_path: Path, trained: Path
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} and what comes with it are not installed")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    for name in ("rows.parquet", "rows.jsonl.zst"):
        (tmp_path / name).touch()
    (tmp_path / "run.toml").write_text((trained / "run.toml").read_text())
    (tmp_path / "model").symlink_to(trained / "run" / "model")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    code = (
        "import sys\nfrom fastsft import cli\n"
        "class Absent:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name.split('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        f"sys.meta_path.insert(0, Absent())\ncli.main({command!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr == f"fastsft: {command[0]}: needs {package}: pip install 'fastsft[{extra}]'\n"
    assert done.returncode == 2


def test_bad_model_folder(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refusal(capsys, "generate", tmp_path / "nowhere", "--prompt", "a")
    assert str(tmp_path) in refusal(capsys, "generate", tmp_path, "--prompt", "a")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"')
    assert "config.json" in refusal(capsys, "eval", tmp_path, "--data", trained / "rows.jsonl")
    (tmp_path / "config.json").write_text('{"model_type": "gpt_bigcode"}')
    assert "gpt_bigcode" in refusal(capsys, "generate", tmp_path, "--prompt", "a")


def test_outputs_that_cannot_be(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": "a b"}, {"text": "a b"}])
    before = source.read_bytes()
    (tmp_path / "link.jsonl").hardlink_to(source)
    for flag in ("--output", "--report"):
        assert "expected a file, got" in refusal(capsys, "dedup", source, flag, tmp_path)
        assert f"{flag}: no folder" in refusal(capsys, "dedup", source, flag, tmp_path / "no" / "out.jsonl")
        for same in (source, tmp_path / "link.jsonl", tmp_path / ".." / tmp_path.name / "in.jsonl"):
            assert f"{flag}: expected another file than the input" in refusal(capsys, "dedup", source, flag, same)
    assert source.read_bytes() == before
    for verb in ("train", "prepare"):
        for output in (source, source / "run"):
            message = refusal(capsys, verb, trained / "run.toml", "--output", output)
            assert message.startswith("output: expected a folder, got ")
    assert "expected a new or empty folder" in refusal(capsys, "demo", "--output", source)
    assert refusal(capsys, "eval", trained / "run" / "model", "--tasks", tmp_path) == f"{tmp_path}: Is a directory"


def test_impossible_requests(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained / "run" / "model"
    assert "exactly one of" in refusal(capsys, "generate", model)
    assert "--data, --tasks" in refusal(capsys, "eval", model)
    for k in ("0", "2"):
        refused = refusal(capsys, "eval", model, "--tasks", trained / "rows.jsonl", "--k", k)
        assert refused == f"eval: --k: expected numbers from 1 to --n, 1, got {k}"
    assert refusal(capsys, "generate", trained / "run", "--prompt", "a").endswith(f"its model is {model}")
    assert "temperature" in refusal(capsys, "generate", model, "--prompt", "a", "--temperature", "-1")
    assert "model.path" in refusal(capsys, "train")
    assert "data.train" in refusal(capsys, "prepare")
    assert "--show" in refusal(capsys, "prepare", trained / "run.toml", "--show")
    assert "--show" in refusal(capsys, "prepare", trained / "run.toml", "--show", "many")


def test_errors_of_other_packages_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are installed in a folder that is named like ours."""
    found: dict[str, Any] = {}
    exec(compile("def info(): raise ValueError('deep')", "elsewhere/fastsft/lib/other.py", "exec"), found)
    monkeypatch.setitem(cli.VERBS, "info", (found["info"], False))
    with pytest.raises(ValueError, match="deep"):
        cli.main(["info"])
