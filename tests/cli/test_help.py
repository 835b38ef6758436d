"""Help, info, and the form of what --json prints."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import conversations, result_of, write

import fastsft
from fastsft import cli
from fastsft.verbs.console import to_json


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom fastsft import cli\ncli.main(['--help'])\ncli.main(['--version'])\n"
        "print([m for m in ('torch', 'numpy', 'tyro', 'pydantic', 'tokenizers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.splitlines()[-1] == "[]"
    for verb in cli.VERBS:
        assert f"\n  {verb} " in out


HEAVY = ("torch", "pydantic", "pyarrow", "datasets", "tokenizers", "transformers", "jinja2", "rich", "ray")


@pytest.mark.parametrize("verb", ["dedup", "decontaminate"])
def test_data_verbs_start_at_once(verb: str, tmp_path: Path) -> None:
    """What takes seconds to import, or is an extra, is imported by neither verb for files of JSON lines."""
    rows, others = (write(tmp_path / name, conversations(20)) for name in ("rows.jsonl", "others.jsonl"))
    command = [verb, str(rows), "-o", str(tmp_path / "kept.jsonl"), "--json"]
    command += ["--against", str(others)] if verb == "decontaminate" else []
    code = (
        "import sys\nimport tyro\nbefore = set(sys.modules)  # tyro 0.9 imports rich\nfrom fastsft import cli\n"
        f"cli.main({command})\nprint([m for m in {HEAVY} if m in sys.modules.keys() - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_each_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*verb.split(), "--help"])
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


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"cpu", "cuda", "ops"} <= result_of(capsys, "info").keys()
    cli.main(["info"])
    assert "linear_cross_entropy" in capsys.readouterr().out


def test_info_names_extras_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets are no markup. What has no use without a GPU's torch or kernels is not advised."""
    found = fastsft.info()
    reason = "pip install 'fastsft[cuda]'"
    found["ops"] = {"sample": {"cpu": {"kind": "native", "reason": reason}}}
    found["cuda"] |= {"gpus_unread": "cuda-python is not installed", "torch": None, "built_for": None}
    monkeypatch.setattr(fastsft, "info", lambda: found)
    cli.main(["info"])
    out = capsys.readouterr().out
    assert reason in out
    assert "cuda-python is not installed" not in out
    found["cuda"]["torch"] = "12.8"
    cli.main(["info"])
    assert "cuda-python is not installed" in capsys.readouterr().out


def test_json_has_no_nan() -> None:
    value = {"a": math.nan, "b": [(math.inf, 1.5)], 1: "NaN"}
    assert json.loads(to_json(value)) == {"a": None, "b": [[None, 1.5]], "1": "NaN"}
