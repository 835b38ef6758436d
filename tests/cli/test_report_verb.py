"""report: one run, several, one that was killed; every string escaped, nothing loaded from elsewhere."""

from __future__ import annotations

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import orjson
import pytest
from cli_cases import refusal, result_of

from fastsft import cli
from fastsft.report.run import Run, thinned
from fastsft.train.metrics import read_metrics


class Links(HTMLParser):
    """What a browser would load or open."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data")]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def page_of(run: Path) -> str:
    cli.main(["report", str(run)])
    return (run / "report.html").read_text(encoding="utf-8")


def test_one_run(run: Path) -> None:
    pytest.importorskip("matplotlib", reason="part of the report extra")
    with open(run / "metrics.jsonl", "ab") as stream:
        for row in (
            {"kind": "sample", "step": 2, "prompt": "<script>", "text": "an & answer", "seconds": 2.0},
            {"kind": "signal", "step": 2, "name": "loss", "value": 9.0, "centre": 2.0, "samples": ["f:1"]},
            {"kind": "pass_at_k", "step": 2, "pass_at": {"1": 0.25}, "statuses": {"ok": 1}, "seconds": 3.0},
        ):  # fmt: skip
            stream.write(orjson.dumps(row) + b"\n")
    page = page_of(run)
    links = Links()
    links.feed(page)
    assert all(link.startswith("#") for link in links.found)
    assert "<script" not in page
    assert html.escape("<script>") in page
    steps = [m for m in read_metrics(run / "metrics.jsonl") if m["kind"] == "step"]
    for expected in (f"{steps[-1]['loss']:.4g}", "an &amp; answer", "pass@1 0.250", "f:1", "model.init.hidden_size",
                     "cpu.isa_active", "rows read", "train.max_steps", "finished"):  # fmt: skip
        assert expected in page, expected
    for title in (
        "loss",
        "loss by segment",
        "learning rate",
        "gradient norm",
        "throughput",
        "time per phase",
        "pass@k",
    ):
        assert f'aria-label="{title}, ' in page, title
    assert "Settings that differ" not in page


def test_several_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="part of the report extra")
    other = Path(shutil.copytree(run, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config["optim"]["lr"] = 0.25
    (other / "config.json").write_text(json.dumps(config))
    results = result_of(capsys, "report", run, other, "-o", tmp_path / "both.html")
    assert [r["run"] for r in results] == ["run", "other"]
    assert results[0]["early steps"] == 1
    assert results[0]["early loss"] == read_metrics(run / "metrics.jsonl")[1]["loss"]
    page = (tmp_path / "both.html").read_text()
    table = page.partition("Settings that differ")[2].partition("</table>")[0]
    assert re.findall(r"<td>([^<]*)</td>", table) == ["optim.lr", "2e-05", "0.25"]
    assert "run held-out from" in page
    assert "other held-out from" in page


def test_runs_of_one_name_are_told_apart(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(run, tmp_path / "again" / "run"))
    results = result_of(capsys, "report", run, other, "-o", tmp_path / "both.html")
    assert [r["run"] for r in results] == [str(run), str(other)]
    assert "expected different runs" in refusal(capsys, "report", run, run / ".." / "run")


def test_losses_that_were_not_finite(run: Path) -> None:
    """JSON has them as null: gaps of the curves, and no best loss."""
    with open(run / "metrics.jsonl", "ab") as stream:
        stream.write(b'{"kind":"eval","step":2,"loss":null,"seconds":1.0}\n')
        step = next(m for m in read_metrics(run / "metrics.jsonl") if m["kind"] == "step")
        stream.write(orjson.dumps({**step, "segments": dict.fromkeys(step["segments"])}) + b"\n")
    finite = [m["loss"] for m in read_metrics(run / "metrics.jsonl") if m["kind"] == "eval" and m["loss"] is not None]
    assert Run.read(run).summary()["best held-out loss"] == min(finite)
    page_of(run)


def test_a_killed_run(run: Path) -> None:
    shutil.rmtree(run / "model")
    lines = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(lines[: lines.rindex(b'"kind"') + 20])
    assert "not finished" in page_of(run)
    for missing in ("metrics.jsonl", "about.json"):
        (run / missing).unlink()
    assert "no step" in page_of(run)


def test_time_per_phase_is_the_steps_time(run: Path) -> None:
    steps = [m for m in read_metrics(run / "metrics.jsonl") if m["kind"] == "step"]
    for row in steps:
        assert sum(row["phases"].values()) == pytest.approx(row["seconds"])
        assert min(row["phases"].values()) > 0
        assert row["mfu"] > 0
    seconds = Run.read(run).seconds()
    assert sum(r["phases"]["optimizer"] for r in steps) == pytest.approx(seconds["optimizer"])
    assert set(seconds) == {"data", "forward_backward", "optimizer", "evaluation", "saving"}


def test_long_curves_are_means() -> None:
    x, y = thinned([(i, 2 * i) for i in range(1200)])
    assert (x[:2], y[:2], len(x)) == ([1, 4], [2, 8], 400)
    assert thinned([]) == ([], [])


def test_mistakes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a run's folder" in refusal(capsys, "report", tmp_path)
    refused = refusal(capsys, "report", trained / "run" / "model")
    assert "found no run's config.json" in refused  # a model has one too
    assert "runs beside it: run" in refusal(capsys, "report", trained / "xyz")
    assert "did you mean 'run'?" in refusal(capsys, "report", trained / "runn")
    assert "at least one run" in refusal(capsys, "report")
