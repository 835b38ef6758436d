"""What hostile code tries, really tried; each attempt must fail, be over in time, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastsft.verify.sandbox import Limits, run

LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@pytest.mark.parametrize(
    "call",
    ["ptrace(0, 0, 0, 0)", "unshare(0x10000000)", "setns(0, 0)", "mount(b'a', b'/', b'tmpfs', 0, 0)", "chroot(b'/')",
     "process_vm_readv(1, 0, 0, 0, 0, 0)"],
)  # fmt: skip
def test_calls_that_end_the_process(call: str, layers: tuple[str, ...]) -> None:
    if "seccomp" not in layers:
        pytest.skip("no seccomp on this machine")
    result = run(f"{LIBC}libc.{call}\nprint('went on')")
    assert (result.status, result.stdout) == ("violation", "")


def test_clone_and_its_newer_form(layers: tuple[str, ...]) -> None:
    """By number, past every wrapper: fork as clone, clone3, and x86's 32-bit numbers."""
    if "seccomp" not in layers:
        pytest.skip("no seccomp on this machine")
    for number, arguments in ((56 if os.uname().machine == "x86_64" else 220, "17, 0, 0, 0, 0"), (435, "b'', 64")):
        result = run(f"{LIBC}print(libc.syscall({number}, {arguments}), ctypes.get_errno())")
        assert result.stdout.split()[0] == "-1", result
        assert int(result.stdout.split()[1]) in (1, 38)


def test_signals_reach_nobody() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        code = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for pid in ({bystander.pid}, {os.getpid()}, os.getppid(), -1, 0, 1, 2):
    for send in (os.kill, lambda pid, s: libc.tgkill(pid, pid, s), lambda pid, s: libc.syscall(129, pid, s, 0)):
        try:
            send(pid, {int(signal.SIGKILL)})
        except OSError:
            pass
print('done')
"""
        assert run(code).stdout == "done\n"
        assert bystander.poll() is None
        bystander.kill()
    assert run("pass").status == "ok"


def test_ways_around_through_proc(layers: tuple[str, ...]) -> None:
    if not {"root", "landlock"} & set(layers):
        pytest.skip("neither a root of its own nor Landlock on this machine")
    for path in ("/proc/1/root/etc/passwd", "/proc/self/root/etc/passwd", "/proc/self/mem", "/proc/self/fd/0",
                 f"/proc/{os.getpid()}/environ", "/proc/sys/kernel/core_pattern", "/proc/self/cwd/../../etc/passwd",
                 "/sys/kernel", "/dev/mem", "/dev/sda", "/dev/vda", "/dev/fuse", "/dev/ptmx"):  # fmt: skip
        result = run(f"print(open({path!r}, 'rb').read(10))")
        assert result.status in ("error", "violation"), path
        assert result.stdout == ""


def test_links_lead_nowhere(layers: tuple[str, ...], tmp_path: Path) -> None:
    if not {"root", "landlock"} & set(layers):
        pytest.skip("neither a root of its own nor Landlock on this machine")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for make in ("os.symlink({!r}, 'f')", "os.link({!r}, 'f')", "os.symlink('/', 'd'); os.symlink('d' + {!r}, 'f')"):
        for use in ("open('f').read()", "open('f', 'w')", "os.chmod('f', 0o777)", "open('f/../secret').read()"):
            result = run(f"import os\n{make.format(str(secret))}\n{use}\nprint('went on')")
            assert result.status in ("error", "violation"), (make, use)
    assert secret.read_text() == "secret"
    up = run("import os\nfor _ in range(9): os.chdir('..')\nprint(os.path.exists('etc/passwd'))")
    assert up.stdout == "False\n" or "root" not in layers


@pytest.mark.parametrize(
    "code",
    [
        "x = [bytearray(1 << 20) for _ in range(1 << 20)]",
        "x = 'x' * (1 << 40)",
        "import mmap\nx = [mmap.mmap(-1, 1 << 24) for _ in range(1000)]\nfor m in x: m.write(bytes(1 << 24))",
        "def f(n): return f(n + 1) + [n]\nimport sys\nsys.setrecursionlimit(1 << 30)\nf(0)",
        "open('f', 'wb').truncate(1 << 40)",
        "i = 0\nwhile True:\n    open(str(i), 'wb').write(bytes(1 << 20))\n    i += 1",
        "10 ** 10 ** 10",
    ],
)
def test_bombs(code: str) -> None:
    began = time.monotonic()
    result = run(code, limits=Limits(seconds=1.0, memory_bytes=256 << 20))
    assert result.status != "ok"
    assert time.monotonic() - began < 10
    assert run("pass").status == "ok"


def test_output_without_end_costs_no_memory_here() -> None:
    result = run(
        "import os\nblock = b'x' * (1 << 20)\nwhile True: os.write(1, block)", limits=Limits(output_bytes=1000)
    )
    assert (result.status, len(result.stdout)) == ("output_limit", 1000)


def test_a_lied_verdict_is_none() -> None:
    """The run's pipe is where a verdict would go; without the secret it says nothing, and a flood of it is cut."""
    write = "    try:\n        while True: os.write(d, b'ok\\n' * 1000)\n    except OSError: pass"
    flood = f"import os\nfor d in range(3, 64):\n{write}"
    result = run(flood, check="pass", limits=Limits(seconds=1.0))
    assert result.status in ("ok", "timeout"), "an honest end, or a pipe that nobody reads any more"
    assert run(flood + "\nos._exit(0)", check="pass", limits=Limits(seconds=1.0)).status != "ok"
