"""The sandbox on kernels that refuse some of its layers: it says so, what is left holds, and too little is refused."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastsft.verify.passk import evaluate_tasks
from fastsft.verify.pool import POOL
from fastsft.verify.sandbox import Limits, run
from fastsft.verify.tasks import Task

Forbid = Callable[..., tuple[str, ...]]
LOSSES = [(), ("root",), ("namespaces",), ("landlock",), ("seccomp",), ("namespaces", "landlock"), ("root", "landlock")]

FAILED = ("error", "violation")


@pytest.mark.parametrize("lost", LOSSES, ids=lambda names: "-".join(names) or "nothing")
def test_what_is_left_holds(lost: tuple[str, ...], kernel_without: Forbid, tmp_path: Path) -> None:
    left = kernel_without(*lost)
    if not {"namespaces", "seccomp"} & set(left):
        pytest.skip("this machine would refuse")
    result = run("print(input())", check="open('own', 'w').write('x')", stdin="hello")
    assert (result.status, result.stdout, result.layers) == ("ok", "hello\n", left), result

    assert run("import os\nos._exit(0)", check="pass").status == "error"
    assert run("while True: pass", limits=Limits(seconds=0.2)).status == "timeout"
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert run(f"import socket\nsocket.create_connection({server.getsockname()})").status in FAILED
    if {"root", "landlock"} & set(left):
        secret = tmp_path / "secret"
        secret.write_text("secret")
        assert run(f"open({str(secret)!r})").status in FAILED
        assert run(f"import os\nos.unlink({str(secret)!r})").status in FAILED
        assert run(f"open({str(tmp_path / 'new')!r}, 'w')").status in FAILED
        assert [p.name for p in tmp_path.iterdir()] == ["secret"]


def test_no_layer_against_the_network_is_refused(kernel_without: Forbid) -> None:
    left = kernel_without("namespaces", "seccomp")
    result = run("print(1)")
    assert (result.status, result.stdout, result.layers) == ("refused", "", ())
    assert "no layer that shuts off the network" in result.stderr
    with pytest.raises(RuntimeError, match="sandbox: no layer"):
        evaluate_tasks([Task("t", "", "pass")], [["pass"]])
    weaker = run("print(1)", allow_weaker=True)
    assert (weaker.status, weaker.stdout, weaker.layers) == ("ok", "1\n", left)


def test_metadata_of_files_outside_stays(kernel_without: Forbid, tmp_path: Path) -> None:
    """Landlock leaves chmod and the like alone; without a root of its own, the system call filter must not."""
    kernel_without("root")
    file = tmp_path / "mine"
    file.write_text("x")
    file.chmod(0o600)
    before = file.stat()
    for call in ("chmod({!r}, 0o777)", "utime({!r}, (1, 1))", "chown({!r}, -1, os.getgid())",
                 "setxattr({!r}, 'user.a', b'b')"):  # fmt: skip
        result = run(f"import os\nos.{call.format(str(file))}")
        assert "PermissionError" in result.stderr, call
    assert file.stat() == before
    # A file that it may read is as safe: one of the interpreter's own, which the user may own.
    assert "PermissionError" in run("import os\nos.fchmod(os.open(os.__file__, os.O_RDONLY), 0o777)").stderr


def test_nothing_is_left_behind_on_the_disk(
    kernel_without: Forbid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_without("root", "seccomp")
    folder, outside = tmp_path / "temporary", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir(0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    locked = "os.makedirs('d/e')\nopen('d/e/f', 'w').close()\nos.chmod('d/e', 0)\nos.chmod('d', 0)"
    deep = "for _ in range(1500):\n    os.mkdir('a')\n    os.chdir('a')"
    result = run(f"import os\nos.symlink({str(outside)!r}, 'link')\n{locked}\n{deep}", allow_weaker=True)
    assert result.status == "ok", result
    assert [path.name for path in folder.glob("*/*")] == ["root"], "the supervisor waits with its own folders only"
    POOL.close()
    assert os.listdir(folder) == []
    assert outside.stat().st_mode & 0o777 == 0o700
