"""What is drawn is a function of (seed, task, sample), goes on after a kill at any byte, and is guarded by its plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthesis_cases import TASKS, Engine, judged_here, model_files

from fastsft.synthesis import draw as drawing
from fastsft.synthesis.draw import Drawn, DrawOptions, draw

OPTIONS = DrawOptions(n=4, max_tokens=8, seed=3)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "LLM", Engine)
    monkeypatch.setattr(drawing, "judge", judged_here)
    monkeypatch.setattr(drawing, "_GROUP", 4 * 6)  # six tasks at a time
    monkeypatch.setattr(Engine, "calls", [])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_files(tmp_path / "model")


def test_samples(model: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    drawn = draw(model, TASKS, tmp_path / "work", OPTIONS, progress=lambda *step: told.append(step))
    assert [d.task_id for d in drawn] == [t.task_id for t in TASKS]
    assert {len(d.samples) for d in drawn} == {0, 4}
    assert [(d.task_id, d.problem) for d in drawn if not d.samples] == [("t/13", "too long")]
    for d in drawn:
        for s in d.samples:
            right = f"x = {d.task_id.removeprefix('t/')}" in s.text.split("\n")[2].rstrip()
            assert s.failure == (None if right else "AssertionError")
            assert s.tokens == 2
            assert -1.25 <= s.logprob <= -0.25
    assert {s.finished for d in drawn for s in d.samples} == {True, False}
    assert drawn[0].pass_rate == 0.0
    assert 0 < sum(d.passed for d in drawn) < 4 * 19
    assert [len(c) for c in Engine.calls] == [6, 6, 5, 2]  # the thirteenth task was left out of its group
    assert [step for step in told if step[0] == "tasks sampled"] == [
        ("tasks sampled", n, 20) for n in (0, 6, 12, 18, 20)
    ]


def test_a_sample_depends_on_its_task_and_the_seed_alone(model: Path, tmp_path: Path) -> None:
    drawn = {d.task_id: d for d in draw(model, TASKS, tmp_path / "all", OPTIONS)}
    for d in draw(model, TASKS[::-1][:7], tmp_path / "some", OPTIONS):
        assert d == drawn[d.task_id]
    few = draw(model, TASKS[:3], tmp_path / "few", replace(OPTIONS, n=2))
    assert [d.samples for d in few] == [drawn[d.task_id].samples[:2] for d in few]
    other = draw(model, TASKS, tmp_path / "other", replace(OPTIONS, seed=4))
    assert [d.samples for d in other] != [d.samples for d in drawn.values()]
    seeds = {drawing._params(OPTIONS, t.task_id).seed or 0 for t in TASKS}
    assert len({s + i for s in seeds for i in range(4)}) == 80


def test_killed_at_any_byte(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    draw(model, TASKS, folder, OPTIONS)
    path = folder / "samples.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    group = [sum(map(len, lines[: 6 * i])) for i in range(4)]
    Engine.calls.clear()
    for cut in [*range(0, len(whole), 197), *(g + d for g in group for d in (-1, 0, 1) if g + d >= 0), len(whole)]:
        for garbage in (b"", b"\0\0{"):
            path.write_bytes(whole[:cut] + garbage)
            Engine.calls.clear()
            draw(model, TASKS, folder, OPTIONS)
            assert path.read_bytes() == whole, cut
            groups = 4 if cut == len(whole) else sum(g <= cut for g in group) - 1
            assert len(Engine.calls) == 4 - groups, cut


def test_finished_draws_need_no_engine(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = draw(model, TASKS, tmp_path / "work", OPTIONS)
    monkeypatch.setattr(drawing, "LLM", None)
    assert draw(model, TASKS, tmp_path / "work", OPTIONS) == first


def test_a_group_is_judged_before_it_is_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    expected = draw(model, TASKS, tmp_path / "whole", OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(drawing, "judge", killed)
        with pytest.raises(KeyboardInterrupt):
            draw(model, TASKS, tmp_path / "work", OPTIONS)
    assert (tmp_path / "work" / "samples.jsonl").read_bytes() == b""
    assert draw(model, TASKS, tmp_path / "work", OPTIONS) == expected


def test_other_settings_are_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    draw(model, TASKS, folder, OPTIONS)
    before = (folder / "samples.jsonl").read_bytes()
    changes: list[tuple[list[Any], DrawOptions, str]] = [
        (TASKS, replace(OPTIONS, n=5, temperature=1.0), "n, temperature"),
        (TASKS, replace(OPTIONS, stop=("x",)), "stop"),
        (TASKS[1:], OPTIONS, "tasks"),
        ([*TASKS[:-1], replace(TASKS[-1], check="assert True")], OPTIONS, "tasks"),
    ]
    for tasks, options, names in changes:
        with pytest.raises(ValueError, match=f"drawn with other settings: {names}\\. Restore"):
            draw(model, tasks, folder, options)
    (model / "model.safetensors").write_text("other")
    with pytest.raises(ValueError, match=r"drawn with other settings: model\."):
        draw(model, TASKS, folder, OPTIONS)
    assert (folder / "samples.jsonl").read_bytes() == before


def test_refusals(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected different task_ids, got 't/2' twice"):
        draw(model, [*TASKS, TASKS[2]], tmp_path / "work", OPTIONS)
    with pytest.raises(ValueError, match="n: expected an integer >= 1, got 0"):
        draw(model, TASKS, tmp_path / "work", replace(OPTIONS, n=0))
    assert not (tmp_path / "work").exists()


def test_every_task_without_a_fitting_prompt(model: Path, tmp_path: Path) -> None:
    drawn = draw(model, TASKS[13:14], tmp_path / "work", OPTIONS)
    assert drawn == [Drawn("t/13", (), "too long")]
    assert json.loads((tmp_path / "work" / "samples.jsonl").read_text())["problem"] == "too long"
