"""Programs in other languages: each class of result, and what a program that may start processes tries with them."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from fastsft.verify.judge import failure_kind, judge
from fastsft.verify.languages import read_languages
from fastsft.verify.sandbox import Limits, SandboxResult
from fastsft.verify.tasks import Task

SUMS = {
    "c": '#include <stdio.h>\nint main(){int a,b;scanf("%d %d",&a,&b);printf("%d\\n",a+b);return 0;}',
    "cpp": "#include <iostream>\nint main(){int a,b;std::cin>>a>>b;std::cout<<a+b<<std::endl;}",
    "bash": "read a b\necho $((a + b))",
    "javascript": "const [a, b] = require('fs').readFileSync(0, 'utf8').split(' ').map(Number); console.log(a + b)",
    "perl": 'my ($a, $b) = split " ", <STDIN>; print $a + $b, "\\n"',
    "python": "print(sum(map(int, input().split())))",
}
COMMANDS = {"c": "gcc", "cpp": "g++", "javascript": "node", "python": "python3"}
CASES = (("1 2\n", "3\n"), ("30 -4\n", "26\n"))


@pytest.fixture(autouse=True)
def _namespaces(layers: tuple[str, ...]) -> None:
    if "namespaces" not in layers:
        pytest.skip("no namespaces on this machine, and without them no other languages")


def judged(language: str, code: str, cases: tuple[tuple[str, str], ...] = CASES, **limits: float) -> SandboxResult:
    if not shutil.which(COMMANDS.get(language, language)):
        pytest.skip(f"no {language} on this machine")
    return judge([(Task("t", "", cases=cases, language=language), code)], limits=Limits(**limits))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("language", SUMS)
def test_each_language(language: str) -> None:
    assert judged(language, SUMS[language]).status == "ok"
    wrong = judged(language, SUMS[language].replace("+", "*").replace("sum", "max"))
    assert (wrong.status, failure_kind(wrong)) == ("wrong", "WrongOutput")
    assert judged(language, "}{ if (").status == "compile_error"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("return 3;", "error"),
        ("abort();", "error"),
        ("*(volatile int *)0 = 1;", "error"),
        ("for (;;);", "timeout"),
        ("sleep(60);", "timeout"),
        ("for (;;) puts(\"xxxxxxxxxxxxxxxxxxxxxxxxxxxxx\");", "output_limit"),
        ("for (;;) { char *p = malloc(1 << 20); if (!p) return 1; memset(p, 1, 1 << 20); }", "memory"),
        ("char *p = mmap(0, 1 << 30, 3, MAP_SHARED | MAP_ANONYMOUS, -1, 0); return p == MAP_FAILED;", "error"),
        ("ptrace(0, 0, 0, 0);", "violation"),
        ("unshare(0x10000000);", "violation"),
        ("return socket(AF_INET, SOCK_STREAM, 0) < 0;", "error"),
        ("return open(\"/etc/passwd\", O_RDONLY) < 0;", "error"),
        ("return open(\"/proc/self/mem\", O_RDWR) < 0;", "error"),
        ("return symlink(\"/etc/passwd\", \"l\") || open(\"l\", O_RDONLY) < 0;", "error"),
    ],
)  # fmt: skip
def test_each_end(body: str, status: str) -> None:
    headers = (
        "fcntl.h",
        "sched.h",
        "stdio.h",
        "stdlib.h",
        "string.h",
        "sys/mman.h",
        "sys/ptrace.h",
        "sys/socket.h",
        "unistd.h",
    )
    source = "#define _GNU_SOURCE\n" + "".join(f"#include <{h}>\n" for h in headers) + f"int main(){{{body} return 0;}}"
    began = time.monotonic()
    result = judged("c", source, (("", ""),), seconds=5.0 if status == "memory" else 0.5, memory_bytes=64 << 20)
    assert result.status == status, result
    assert time.monotonic() - began < 15


def test_no_memory_in_cpp() -> None:
    bad_alloc = "#include <vector>\nint main(){std::vector<char*> v; for(;;) v.push_back(new char[1<<24]());}"
    assert judged("cpp", bad_alloc, memory_bytes=64 << 20).status == "memory"


def _running(word: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in path.read_text():
                found.append(str(path))
        except OSError:
            pass
    return found


BOMBS = {
    "fork bomb": "b() { b | b & }; b; sleep 60",
    "stubborn children": "for i in 1 2 3; do (trap '' TERM INT HUP; sleep NAP) & done; wait",
    "daemon": "(setsid sh -c '(sleep NAP > /dev/null 2>&1 < /dev/null &)' &); echo 3",
    "kills all": "kill -9 -1; kill -9 1; kill -9 $PPID; echo 3",
}


@pytest.mark.parametrize("name", BOMBS)
def test_processes_are_counted_and_all_end(name: str, layers: tuple[str, ...]) -> None:
    if name == "fork bomb" and "processes" not in layers:
        pytest.skip("processes are not counted on this machine")
    nap = f"4242.{os.getpid()}"  # to be told from those of other runs on this machine
    began = time.monotonic()
    result = judged("bash", BOMBS[name].replace("NAP", nap), seconds=1.0, processes=32)
    if name == "daemon":
        assert result.status == "wrong", "it ends by itself, and the second case expects another sum"
    assert time.monotonic() - began < 15
    assert not _running(nap)
    assert judged("bash", SUMS["bash"]).status == "ok", "the machine is as before"


def test_the_number_of_processes(layers: tuple[str, ...]) -> None:
    if "processes" not in layers:
        pytest.skip("processes are not counted on this machine")
    code = "i=0; while sleep 30 & do i=$((i + 1)); echo $i; done 2> /dev/null"
    result = judged("bash", code, seconds=2.0, processes=10)
    assert result.status != "ok"
    assert len(result.stdout.split()) <= 10


def test_cases_do_not_see_each_other() -> None:
    code = '[ -e seen ] && echo seen; touch seen; ls; echo "$PWD" > /dev/null'
    result = judged("bash", code, (("", "main.sh\nseen\n"), ("", "main.sh\nseen\n")))
    assert result.status == "ok", result


def test_a_source_cannot_include_what_is_not_its_own() -> None:
    result = judged("c", '#include "/etc/passwd"\nint main(){return 0;}')
    assert result.status == "compile_error"
    assert "root:" not in result.stderr


def test_a_language_in_a_few_lines(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('[reverse]\nfile = "text"\nrun = ["rev", "text"]\nlimits = {seconds = 2.0}\n\n'
                    '[gone]\nfile = "a"\nrun = ["no-such-command"]\n')  # fmt: skip
    own = read_languages(file)
    if shutil.which("rev"):
        task = Task("t", "", cases=(("", "cba\n"),), language="reverse")
        assert [r.status for r in judge([(task, "abc\n"), (task, "abd\n")], languages=own)] == ["ok", "wrong"]
    gone = Task("t", "", cases=(("", ""),), language="gone")
    with pytest.raises(RuntimeError, match=r"no-such-command: .*No such file"):
        judge([(gone, "")], languages=own)
    with pytest.raises(ValueError, match=r"task t: language: expected one of bash, c, .*got 'gone'"):
        judge([(gone, "")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "x: expected a table, got 1"),
        ("[x]\nfile = 'a'", r"x\.run: expected a list of strings, got \[\]"),
        ("[x]\nrun = ['a']", r"x\.file: expected a file's name, got None"),
        ("[x]\nfile = '../a'\nrun = ['a']", r"x\.file: expected a file's name, got '../a'"),
        ("[x]\nfile = 'a'\nrun = 'a'", r"x\.run: expected a list of strings, got 'a'"),
        ("[x]\nfile = 'a'\nrun = ['a']\nrum = 1", "x: expected compile, compile_limits, file, .*got 'rum'"),
        ("[x]\nfile = 'a'\nrun = ['a']\nlimits = {second = 1}", r"x\.limits: expected a table with any of seconds"),
        ("[x]\nfile = 'a'\nrun = ['a']\nlimits = {seconds = 0}", "seconds: expected a number above 0"),
        ("[x", "own.toml"),
    ],
)
def test_mistakes_in_a_file_of_languages(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_languages(file)


def test_without_namespaces_nothing_else_is_run(kernel_without: object) -> None:
    kernel_without("namespaces")  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="need namespaces of their own"):
        judged("bash", SUMS["bash"])


def test_the_documented_language(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "verify.md").read_text()
    file = tmp_path / "languages.toml"
    file.write_text(page.partition("```toml languages\n")[2].partition("```")[0])
    go = read_languages(file)["go"]
    assert go.limits == {"memory_bytes": 1 << 30}
    assert (go.compile_limits.seconds, go.compile_limits.memory_bytes) == (60.0, 2 << 30)
