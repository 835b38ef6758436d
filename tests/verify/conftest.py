from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from fastsft.verify import pool, sandbox, seccomp

# What a layer stands on, by system call number; "seccomp" itself is a form of prctl.
_CALLS = {"namespaces": (272, 97), "root": (165, 40), "landlock": (444, 444)}

_PRELUDE = """
import ctypes, struct
code = [(0x20, 0, 0, 0)]
for number in {numbers}:
    code += [(0x15, 0, 1, number), (6, 0, 0, 0x50001)]
if {no_filter}:
    code += [(0x15, 0, 3, {prctl}), (0x20, 0, 0, 16), (0x15, 0, 1, 22), (6, 0, 0, 0x50016)]
code.append((6, 0, 0, 0x7FFF0000))
class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
packed = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
assert libc.prctl(22, 2, ctypes.byref(Program(len(code), packed)), 0, 0) == 0
"""


@pytest.fixture(scope="session")
def layers() -> tuple[str, ...]:
    """What this machine has."""
    return sandbox.run("pass").layers


@pytest.fixture
def kernel_without(layers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, ...]]:
    """Lets the sandbox run on a kernel that refuses layers; returns those that should be left."""

    def forbid(*names: str) -> tuple[str, ...]:
        if "seccomp" not in layers:
            pytest.skip("needs seccomp, to refuse with")
        column = 1 if seccomp.MACHINE == "aarch64" else 0
        numbers = [_CALLS[name][column] for name in names if name in _CALLS]
        prelude = _PRELUDE.format(numbers=numbers, no_filter="seccomp" in names, prctl=(157, 167)[column])
        monkeypatch.setattr(pool, "_START", f"exec({prelude!r}, {{}}); {pool._START}")
        lost = {*names, "root"} if "namespaces" in names else {*names}
        if "root" in lost and os.getuid() == 0:  # then nobody else can run the code, and root's are not counted
            lost.add("processes")
        return tuple(name for name in layers if name not in lost)

    return forbid
