"""fastsft bench: a tiny suite run for real, what is refused, what is said of what is missing."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

from fastsft import cli
from fastsft.bench import run as running
from fastsft.bench import topics

pytest.importorskip("pytest_benchmark")

TINY = '''
"""A tiny bench."""
import pytest

@pytest.mark.parametrize("contestant", ["fastsft", "rival"])
@pytest.mark.parametrize("count", [1000, 2000])
def test_sum(benchmark, limits, count, contestant):
    benchmark.group = f"sum {count}"
    numbers = list(range(count if contestant == "fastsft" else 20 * count))
    benchmark.pedantic(sum, (numbers,), rounds=9)
    limits.measured["1"] = {"copy": 1e10}
    benchmark.extra_info["share_of_copy"] = 0.5

def test_skipped(benchmark):
    pytest.skip("not installed")
'''
BROKEN = '''
"""A bench with a gate that fails."""

def test_gate(benchmark):
    benchmark.group = "gate"
    assert 1 + 1 == 3
'''


@pytest.fixture(autouse=True)
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of two benches around the real one's conftest."""
    folder = tmp_path / "suite"
    folder.mkdir()
    for name in ("conftest.py", "pytest.ini", "sizes.py"):
        shutil.copy(topics.suite() / name, folder)
    (folder / "bench_tiny.py").write_text(TINY)
    (folder / "bench_broken.py").write_text(BROKEN)
    monkeypatch.setitem(topics.TOPICS, "tiny", topics.Topic("tiny", ("tiny",)))
    monkeypatch.setitem(topics.TOPICS, "broken", topics.Topic("broken", ("broken",), ("no_such_module",)))
    monkeypatch.setattr(running, "suite", lambda: folder)
    return folder


def test_a_tiny_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path, plot = tmp_path / "out.json", tmp_path / "out.svg"
    cli.main(["bench", "tiny", "--json", str(path), "--plot", str(plot)])
    out = capsys.readouterr().out
    for words in (
        "sum 1000",
        "sum 2000",
        "median",
        "p20",
        "p80",
        "rival",
        "50% copy",
        "limits, number of threads 1: copy 10.0 GB/s",
    ):
        assert words in out, words
    assert "2 groups with rivals; a rival was faster in 0" in out
    stored = json.loads(path.read_text())
    assert stored["limits"] == {"1": {"copy": 1e10}}
    assert [(r["group"], r["contestant"]) for r in stored["rows"]] == [
        (f"sum {n}", c) for n in (1000, 2000) for c in ("fastsft", "rival")
    ]
    for r in stored["rows"]:
        assert r["bench"] == "tiny"
        assert r["rounds"] == 9
        assert r["p20"] <= r["median"] <= r["p80"]
        assert (r["times_ours"] > 3) == (r["contestant"] == "rival")
    assert "rival" in plot.read_text()


def test_quick_takes_the_first_case_and_stdout_is_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["bench", "tiny", "--quick", "--json", "-"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(r["group"], r["contestant"], r["rounds"]) for r in rows] == [
        ("sum 1000", "fastsft", 3), ("sum 1000", "rival", 3),
    ]  # fmt: skip


def test_progress_of_each_bench() -> None:
    told: list[tuple[str, int, int]] = []
    files = running.files_of([topics.TOPICS["broken"], topics.TOPICS["tiny"]])
    measured = running.run(files, running.Given(), lambda *progress: told.append(progress))
    assert told[0] == ("broken", 0, 1)
    assert told[-1] == ("tiny", 5, 5)
    assert measured.skipped == 1
    assert [why for _, why in measured.failed] == ["assert (1 + 1) == 3"]
    assert len(measured.benchmarks) == 4


def test_a_failed_gate_is_named_and_the_rest_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "broken", "tiny", "--only", "gate or 2000"])
    assert end.value.code == 1
    out, errors = capsys.readouterr()
    assert "sum 2000" in out
    assert "sum 1000" not in out
    assert "bench_broken.py::test_gate: assert (1 + 1) == 3" in errors
    assert "not installed, so left out: no_such_module (pip install 'fastsft[rivals]')" in errors


def test_a_bench_that_cannot_be_imported_is_named(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (suite / "bench_broken.py").write_text("import no_such_module")
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "broken", "tiny"])
    assert end.value.code == 1
    out, errors = capsys.readouterr()
    assert "sum 1000" in out
    assert "bench_broken.py: ModuleNotFoundError: No module named 'no_such_module'" in errors


def test_interrupted_keeps_what_is_measured(suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As Ctrl-C does: both processes get the signal."""
    (suite / "bench_broken.py").write_text(
        "import os, signal, time\n\ndef test_late(benchmark):\n    os.kill(os.getppid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    )
    path = tmp_path / "out.json"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(SystemExit) as end:
            cli.main(["bench", "tiny", "broken", "--json", str(path)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130
    assert len(json.loads(path.read_text())["rows"]) == 4
    assert "interrupted" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *arguments])
    assert end.value.code == 2
    out, errors = capsys.readouterr()
    assert out == ""
    return errors.strip().splitlines()[-1]


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "unknown topic 'tini'; did you mean 'tiny'?" in refused(capsys, "tini")
    assert "expected all or topics among attention" in refused(capsys)
    assert "--data: no such file" in refused(capsys, "tiny", "--data", str(tmp_path / "none"))
    (tmp_path / "rows.jsonl").write_text('{"question": "?", "answer": "!"}\n')
    assert "rows.jsonl is training data" in refused(capsys, "tiny", "--data", str(tmp_path / "rows.jsonl"))
    assert "--plot: expected a name that ends in .png or .svg" in refused(capsys, "tiny", "--plot", "x.gif")
    assert "--documents: expected at least 1, got -5" in refused(capsys, "tiny", "--documents", "-5")
    assert "--only: expected words of cases' names, got 'nothing'" in refused(capsys, "tiny", "--only", "nothing")
    said = refused(capsys, "tiny", "--only", "two words")
    assert "--only: expected words joined by and, or and not, got 'two words': at column 5: expected end of inp" in said
    assert "nothing was measured, 1 cases were skipped" in refused(capsys, "tiny", "--only", "skipped")
    monkeypatch.setitem(sys.modules, "pytest_benchmark", None)
    assert refused(capsys, "tiny") == "fastsft: bench: needs pytest-benchmark: pip install 'fastsft[bench]'"


def test_results_that_could_not_be_written_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "run", lambda *_: pytest.fail("was run"))
    (tmp_path / "file").touch()
    assert f"--json: expected a file that can be written, got {tmp_path}" in refused(
        capsys, "tiny", "--json", str(tmp_path)
    )
    assert f"{tmp_path}/file" in refused(capsys, "tiny", "--json", f"{tmp_path}/file/a.json")
    assert f"{tmp_path}/file" in refused(capsys, "tiny", "--plot", f"{tmp_path}/file/a.svg")


def test_folders_of_results_are_made(tmp_path: Path) -> None:
    cli.main(["bench", "tiny", "--only", "1000", "--json", str(tmp_path / "a" / "b" / "out.json")])
    assert (tmp_path / "a" / "b" / "out.json").is_file()


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["bench", "list"])
    out = capsys.readouterr().out
    for name in topics.TOPICS:
        assert name in out
    cli.main(["bench", "list", "--json"])
    assert json.loads(capsys.readouterr().out)["tiny"]["benches"] == ["tiny"]


def test_what_is_given_reaches_the_benches(tmp_path: Path) -> None:
    rivals = (Path("/e/python"), Path("/f/python"))
    given = running.Given(tmp_path / "a", (tmp_path / "b", tmp_path / "c"), 5, tmp_path / "d", rivals, True)
    assert given.environment() == {
        "FASTSFT_BENCH_DATA": f"{tmp_path}/a", "FASTSFT_BENCH_EVAL": f"{tmp_path}/b:{tmp_path}/c",
        "FASTSFT_BENCH_DOCS": "5", "FASTSFT_BENCH_MODELS": f"{tmp_path}/d",
        "FASTSFT_BENCH_RIVALS": "/e/python:/f/python", "FASTSFT_BENCH_QUICK": "1",
    }  # fmt: skip
    assert running.Given().environment() == {}
    used = "".join(path.read_text() for path in topics.suite().glob("*.py"))
    for name in given.environment():
        assert name in used or f'size("{name.removeprefix("FASTSFT_BENCH_")}"' in used, name
