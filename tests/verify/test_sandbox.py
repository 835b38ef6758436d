"""Each limit and each wall of the sandbox, tried from the inside."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from fastsft.verify.sandbox import Limits, SandboxResult, run, run_all

SECOND = Limits(seconds=1.0)


@pytest.fixture(scope="module")
def layers() -> tuple[str, ...]:
    return run("pass").layers


def denied(result: SandboxResult, kind: str = "PermissionError") -> bool:
    return result.status == "error" and kind in result.stderr


def test_runs_and_reports(layers: tuple[str, ...]) -> None:
    result = run("import math, json; print(input(), math.floor(2.5))", stdin="hello\n")
    assert (result.status, result.stdout, result.stderr) == ("ok", "hello 2\n", "")
    assert "limits" in layers
    assert {"namespaces", "seccomp"} & set(layers), "this machine has no layer that shuts off the network"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("x = bytearray(1 << 30)", "memory"),
        ("while True: print('x' * 1000)", "output_limit"),
        ("1 / 0", "error"),
        ("raise SystemExit(3)", "error"),
        ("raise SystemExit(0)", "ok"),
        ("def f(:", "error"),
        ("import os; os.abort()", "error"),
    ],
)
def test_ends(code: str, status: str) -> None:
    began = time.monotonic()
    result = run(code, limits=SECOND)
    assert result.status == status, result
    assert time.monotonic() - began < 6
    assert len(result.stdout) + len(result.stderr) <= 2 * SECOND.output_bytes


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(1, 0)",
        "import os; os.unshare(0x10000000)" if hasattr(os, "unshare") else "import os; os.fork()",
    ],
)
def test_system_calls_denied(code: str, layers: tuple[str, ...]) -> None:
    if "seccomp" not in layers:
        pytest.skip("no seccomp on this machine")
    assert denied(run(code, limits=SECOND))


def test_files(layers: tuple[str, ...], tmp_path: Path) -> None:
    if "landlock" not in layers:
        pytest.skip("no Landlock on this machine")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    assert denied(run(f"open({str(secret)!r}).read()"))
    assert denied(run("open('/etc/passwd').read()"))
    assert denied(run(f"open({str(tmp_path / 'new')!r}, 'w')"))
    assert denied(run(f"import os; os.listdir({os.path.expanduser('~')!r})"))
    assert denied(run(f"import os; os.unlink({str(secret)!r})"))
    assert secret.read_text() == "secret"
    result = run("open('own', 'w').write('x'); print(open('own').read())")
    assert (result.status, result.stdout) == ("ok", "x\n")


def test_file_size_is_bounded() -> None:
    result = run("open('big', 'wb').write(bytes(1 << 20))", limits=Limits(file_bytes=1 << 16))
    assert result.status == "error"


def test_nothing_is_left_behind() -> None:
    before = set(Path(tempfile.gettempdir()).glob("fastsft-sandbox-*"))
    run("open('x', 'w').write('x')")
    assert set(Path(tempfile.gettempdir()).glob("fastsft-sandbox-*")) <= before


def test_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert "hunter2" not in run("import os; print(dict(os.environ))").stdout


def test_many_at_once_in_order() -> None:
    results = run_all([f"print({i})" for i in range(12)], workers=4)
    assert [r.stdout for r in results] == [f"{i}\n" for i in range(12)]


def test_metadata_of_files_outside_stays(layers: tuple[str, ...], tmp_path: Path) -> None:
    """Landlock leaves chmod and the like alone; the system call filter must not."""
    if "seccomp" not in layers:
        pytest.skip("no seccomp here")
    file = tmp_path / "mine"
    file.write_text("x")
    file.chmod(0o600)
    before = file.stat()
    for call in ("chmod({!r}, 0o777)", "utime({!r}, (1, 1))", "chown({!r}, -1, os.getgid())",
                 "setxattr({!r}, 'user.a', b'b')"):  # fmt: skip
        assert denied(run(f"import os\nos.{call.format(str(file))}")), call
    assert file.stat() == before
    # A file that it may read is as safe: one of the interpreter's own, which the user may own.
    assert denied(run("import os\nos.fchmod(os.open(os.__file__, os.O_RDONLY), 0o777)"))
