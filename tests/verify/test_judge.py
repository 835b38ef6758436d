from __future__ import annotations

import pytest

from fastsft.verify import judge as judging
from fastsft.verify.judge import failure_kind, judge
from fastsft.verify.sandbox import Limits, SandboxResult
from fastsft.verify.tasks import Task

SUM = Task("sum", "", cases=(("1 2\n", "3\n"), ("10 -4\n", "6\n"), ("", "none\n\n")))


def judged(task: Task, *samples: str, **options: float) -> list[SandboxResult]:
    return judge([(task, s) for s in samples], limits=Limits(**options) if options else None)


def test_programs_are_judged_by_what_they_write() -> None:
    right = "import sys\nn = [int(x) for x in sys.stdin.read().split()]\nprint(sum(n) if n else 'none')"
    blanks = right.replace("print(", "print('', end='')\nprint(").replace("'none')", "'none', end=' \\n \\n')")
    wrong, indented = right.replace("sum(n)", "max(n)"), right.replace("sum(n)", "f' {sum(n)}'")
    results = judged(SUM, right, blanks, wrong, indented, "1 / 0", "int(input())")
    assert [r.status for r in results] == ["ok", "ok", "wrong", "wrong", "error", "error"]
    assert results[2].stderr == "WrongOutput: case 1: expected '3\\n', got '2\\n'\n"
    assert results[3].stderr.startswith("WrongOutput: case 1: ")
    assert [failure_kind(r) for r in results[2:]] == ["WrongOutput", "WrongOutput", "ZeroDivisionError", "ValueError"]


def test_every_case_counts() -> None:
    first, last = "print(3)", "import sys\nn = sys.stdin.read()\nprint(eval('+'.join(n.split())) if n else 'nothing')"
    results = judged(SUM, first, last)
    assert results[0].stderr.startswith("WrongOutput: case 2: ")
    assert results[1].stderr == "WrongOutput: case 3: expected 'none\\n\\n', got 'nothing\\n'\n"


def test_kinds_of_failure() -> None:
    check = Task("f", "", "assert f(1) == 2")
    results = judged(check, "def f(x): return 3", "def f(x):", "g = 1", "import sys; sys.exit(0)", "while True: pass",
                     "f = lambda x: x + 1", seconds=0.5)  # fmt: skip
    assert [failure_kind(r) for r in results] == [
        "AssertionError", "IndentationError", "NameError", "error", "timeout", "ok",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [("", "error"), ("a.b.MyError: x: y", "MyError"), ("Traceback\nKeyError: 'a'\n", "KeyError"), ("no name", "error")],
)
def test_the_kind_is_the_last_lines_exception(stderr: str, kind: str) -> None:
    assert failure_kind(SandboxResult("error", "", stderr, 0.0, ())) == kind


def test_many_at_once_in_order() -> None:
    task = Task("t", "", "assert True")
    results = judge([(task, f"print({i})") for i in range(12)], workers=4)
    assert [r.stdout for r in results] == [f"{i}\n" for i in range(12)]


def test_somebody_must_work() -> None:
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        judge([(SUM, "print(3)")], workers=0)


def test_equal_pairs_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(code: str, *, check: str, limits: Limits | None) -> SandboxResult:
        ran.append(code + check)
        return SandboxResult("ok" if code == check else "error", "", "", 0.0, ())

    monkeypatch.setattr(judging, "run", run)
    a, b = Task("a", "", "x"), Task("b", "", "y")
    steps: list[tuple[int, int]] = []
    pairs = [(a, "x"), (a, "y"), (b, "x"), (a, "x"), (b, "y"), (b, "y")]
    results = judge(pairs, progress=lambda done, total: steps.append((done, total)))
    assert [r.status for r in results] == ["ok", "error", "error", "ok", "ok", "ok"]
    assert sorted(ran) == ["xx", "xy", "yx", "yy"]
    assert steps == [(i, 6) for i in range(1, 7)]
