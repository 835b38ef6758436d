"""Each limit and each wall of the sandbox, tried from the inside."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from fastsft.verify import sandbox
from fastsft.verify.sandbox import Limits, SandboxResult, run

SHORT = Limits(seconds=0.3)


def denied(result: SandboxResult, *kinds: str) -> bool:
    kinds = kinds or ("PermissionError",)
    return result.status in ("error", "violation") and any(kind in result.stderr for kind in kinds)


def test_runs_and_reports(layers: tuple[str, ...]) -> None:
    result = run("import math, json; print(math.floor(2.5))")
    assert (result.status, result.stdout, result.stderr) == ("ok", "2\n", "")
    assert 0 < result.seconds < 5
    assert result.layers == layers
    assert "limits" in layers
    assert {"namespaces", "seccomp"} & set(layers), "this machine has no layer that shuts off the network"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("import os\nos.closerange(1, 64)\nwhile True: pass", "timeout"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", "timeout"),
        ("x = bytearray(1 << 30)", "memory"),
        ("x = []\nwhile True: x.append(object())", "memory"),
        ("while True: print('x' * 1000)", "output_limit"),
        ("import os\nwhile True: os.write(2, b'x' * 1000)", "output_limit"),
        ("1 / 0", "error"),
        ("raise SystemExit(3)", "error"),
        ("raise SystemExit(0)", "ok"),
        ("def f(:", "compile_error"),
        ("f = lambda: f()\nf()", "error"),
        ("import os; os.abort()", "error"),
        ("import ctypes; ctypes.string_at(0)", "error"),
    ],
)
def test_ends(code: str, status: str) -> None:
    limits = Limits(seconds=5.0 if status == "memory" else 0.3, memory_bytes=128 << 20)
    began = time.monotonic()
    result = run(code, limits=limits)
    assert result.status == status, result
    assert time.monotonic() - began < 6
    assert len(result.stdout) + len(result.stderr) <= limits.output_bytes


@pytest.mark.parametrize("name", ["seconds", "memory_bytes", "output_bytes", "file_bytes", "processes"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "1"])
def test_limits_are_checked(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"Limits: {name}: expected a number above 0"):
        Limits(**{name: value})  # type: ignore[arg-type]


def test_too_little_memory_to_start() -> None:
    result = run("print(1)", limits=Limits(memory_bytes=1 << 20))
    assert result.status == "memory"
    assert result.stdout == ""


# --- the check --------------------------------------------------------------------------------------------------------

_WRITE_EVERYWHERE = """
import os
for descriptor in range(64):
    for word in ("ok", "\\nok ok", "{secret} ok"):
        try:
            os.write(descriptor, f"{word}\\n".encode())
        except OSError:
            pass
os._exit(0)
"""


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(0)",
        "raise SystemExit",
        "quit = exit = None\nimport sys\nsys.exit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\n1 / 0",
        "import os\nos.closerange(3, 64)\nos._exit(0)",
        _WRITE_EVERYWHERE,
    ],
)
def test_the_check_must_be_reached(code: str) -> None:
    result = run(code, check="assert True")
    assert result.status == "error"
    assert "exited before its check was done" in result.stderr


def test_the_check_decides() -> None:
    good = "def f():\n    return 1"
    assert run(good, check="assert f() == 1").status == "ok"
    assert run(good, check="import os\nos._exit(0)\nassert f() == 2").status == "error"
    result = run(good, check="x = 3\nassert f() == 2")
    assert result.status == "wrong"
    assert run(good, check="f() + ''").status == run("assert False", check="pass").status == "error"
    assert 'File "check.py", line 2' in result.stderr
    assert "assert f() == 2" in result.stderr


def test_the_secret_is_not_lying_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in what a script sees: its input, descriptors, arguments, environment, module, folder and /proc."""
    secret = "0123456789abcdef"
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda size: secret)
    code = f"""
import os, sys
secret = {secret[:8]!r} + {secret[8:]!r}
found = [repr(sys.argv), repr(sys.orig_argv), repr(dict(os.environ)), repr({{**globals(), "secret": ""}})]
found += os.listdir()
for path in ("/proc/self/cmdline", "/proc/self/environ", "/proc/1/cmdline"):
    try:
        found.append(open(path).read())
    except OSError:
        pass
found.append(sys.stdin.read())
for descriptor in range(64):
    for read in (lambda: os.pread(descriptor, 1 << 20, 0), lambda: os.read(descriptor, 1 << 20)):
        try:
            found.append(read().decode())
        except OSError:
            pass
print(len(found), secret in "".join(found), "hello" in "".join(found))
"""
    result = run(code, stdin="hello")
    assert result.status == "ok", result
    assert result.stdout.split()[1:] == ["False", "True"]


# --- input and output -------------------------------------------------------------------------------------------------


def test_stdin() -> None:
    code = "import sys\nprint(repr(input()), repr(sys.stdin.readline()), repr(open(0).read()))"
    assert run(code, stdin="a\n").stdout == "'a' '' ''\n"
    assert run("import sys\nprint(sys.stdin.read())", stdin="é\n\0\ud800").stdout.startswith("é\n\0")
    large = "x" * (1 << 20)
    assert run("print(len(open(0).read()))", stdin=large).stdout == f"{len(large)}\n"
    assert "EOFError" in run("input()").stderr


def test_output_is_cut() -> None:
    result = run("import sys\nprint('x' * 5000)\nprint('y' * 5000, file=sys.stderr)", limits=Limits(output_bytes=6000))
    assert result.status == "output_limit"
    assert len(result.stdout) + len(result.stderr) == 6000


def test_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert "hunter2" not in run("import os; print(dict(os.environ))").stdout


# --- walls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket()",
        "import socket; socket.socketpair(type=socket.SOCK_DGRAM)",
        "import os; os.fork()",
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(1, 0)",
        "import os; os.setsid()",
        "import fcntl; fcntl.fcntl(0, 8, 1)",
    ],
)
def test_system_calls_denied(code: str, layers: tuple[str, ...]) -> None:
    if "seccomp" not in layers:
        pytest.skip("no seccomp on this machine")
    assert denied(run(code, limits=SHORT))


@pytest.mark.parametrize(
    "code",
    [
        "import asyncio\nasync def f():\n    await asyncio.sleep(0)\nasyncio.run(f())",
        "import concurrent.futures as c\nwith c.ThreadPoolExecutor(4) as p:\n    assert sum(p.map(int, '123')) == 6",
        "import tempfile\nwith tempfile.TemporaryFile() as f:\n    f.write(b'x')",
        "import random, datetime, decimal, re, sqlite3\nsqlite3.connect(':memory:').execute('select 1')",
        "open('/dev/null', 'w').write('x')\nopen('/dev/urandom', 'rb').read(1)",
    ],
)
def test_what_honest_code_needs(code: str) -> None:
    result = run(code)
    assert result.status == "ok", result


def test_thread_bomb() -> None:
    code = "import _thread, time\n_thread.stack_size(32768)\nwhile True: _thread.start_new_thread(time.sleep, (60,))"
    began = time.monotonic()
    assert run(code, limits=Limits(seconds=0.5, memory_bytes=256 << 20)).status != "ok"
    assert time.monotonic() - began < 6


def test_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        assert denied(
            run(f"import socket; socket.create_connection({server.getsockname()})"), "PermissionError", "OSError"
        )
        with pytest.raises(BlockingIOError):
            server.accept()


def test_files(layers: tuple[str, ...], tmp_path: Path) -> None:
    if not {"root", "landlock"} & set(layers):
        pytest.skip("neither a root of its own nor Landlock on this machine")
    # A private root hides what Landlock alone denies.
    kinds = ("FileNotFoundError", "Read-only file system") if "root" in layers else ("PermissionError",)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for code in (
        f"open({str(secret)!r}).read()",
        "open('/etc/passwd').read()",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "import os; os.listdir('/home')",
        f"import os; os.unlink({str(secret)!r})",
        f"import os; os.rename({str(secret)!r}, 'mine')",
    ):
        assert denied(run(code), *kinds, "PermissionError"), code
    assert os.listdir(tmp_path) == ["secret"]
    assert secret.read_text() == "secret"
    result = run("open('own', 'w').write('x'); print(open('own').read())")
    assert (result.status, result.stdout) == ("ok", "x\n")


def test_the_private_root_hides(layers: tuple[str, ...], tmp_path: Path) -> None:
    if "root" not in layers:
        pytest.skip("no mounts on this machine")
    paths = [str(tmp_path), "/etc/passwd", "/proc", "/sys", "/dev/shm", "/bin/sh", __file__]
    result = run(f"import os\nprint([p for p in {paths!r} if os.path.lexists(p)])")
    assert result.stdout == "[]\n"
    library = os.path.dirname(os.__file__)
    for call in (f"open({library + '/new.py'!r}, 'w')", f"os.chmod({library!r}, 0o777)"):
        assert denied(run(f"import os\n{call}"), "Read-only file system", "PermissionError"), call


def test_files_are_bounded(layers: tuple[str, ...]) -> None:
    small = Limits(file_bytes=1 << 16)
    assert run("open('big', 'wb').write(bytes(1 << 20))", limits=small).status == "error"
    if "root" in layers:
        many = "for i in range(64):\n    open(str(i), 'wb').write(bytes(1 << 14))"
        assert denied(run(many, limits=small), "No space left")


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run("import os\nos.mkdir('d')\nopen('d/x', 'w').write('x')\nos.umask(0o777)\nos.mkdir('e')")
    run("while True: pass", limits=Limits(seconds=0.2))
    assert os.listdir(tmp_path) == []
