"""The inside of the sandbox: started by ``sandbox.py``, it locks itself in and then executes the code it is given.

Standard library only, started with ``-I -S``. System call numbers are those of x86-64 and aarch64 Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import platform
import resource
import struct
import sys

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 38, 22
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
_CLONE_NEWNET, _CLONE_NEWIPC = 0x40000000, 0x8000000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446

# System calls that answer EPERM: (x86-64, aarch64); -1 where the machine has none.
_DENIED = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "ptrace": (101, 117), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268),
    "bpf": (321, 280), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "kexec_load": (246, 104),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142),
    "swapon": (167, 224), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "io_uring_setup": (425, 425), "setsid": (112, 157), "setpgid": (109, 154),
    "kill": (62, 129), "tkill": (200, 130), "pidfd_send_signal": (424, 424), "fork": (57, -1), "vfork": (58, -1),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    # Landlock rules on opening, not on metadata: without these, code could change the mode and times of any file.
    "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, -1),
    "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54), "utime": (132, -1), "utimes": (235, -1),
    "futimesat": (261, -1), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
# clone is allowed for threads only; clone3 hides its flags from a filter, and libc falls back to clone on ENOSYS.
_CLONE, _CLONE3, _CLONE_THREAD = (56, 220), 435, 0x10000
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def main() -> None:
    settings = json.loads(sys.argv[1])
    report = int(sys.argv[2])
    request = json.loads(sys.stdin.buffer.read())
    _LIBC.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    layers = ["limits"]
    if _namespaces():
        layers.append("namespaces")
    _limits(settings)
    if _landlock(settings["readable"], settings["folder"]):
        layers.append("landlock")
    if _seccomp():
        layers.append("seccomp")
    if not {"namespaces", "seccomp"} & set(layers) and not settings["weaker"]:
        os.write(report, b"refused")
        os._exit(1)
    os.write(report, " ".join(layers).encode())
    os.close(report)
    _execute(request)


def _namespaces() -> bool:
    """Move into fresh namespaces; the code then runs in a child, which is process 1 and takes its children with it."""
    flags = _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWPID
    if _LIBC.unshare(flags) != 0:
        return False
    child = os.fork()
    if child == 0:
        _LIBC.prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)
        return True
    _, status = os.waitpid(child, 0)
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def _limits(settings: dict[str, object]) -> None:
    seconds = int(float(str(settings["seconds"]))) + 1
    for what, bound in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, settings["memory"]),
        (resource.RLIMIT_FSIZE, settings["file"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (int(str(bound)), int(str(bound))))


class _RulesetAttr(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64),)


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _landlock(readable: list[str], writable: str) -> bool:
    version = _LIBC.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    # Bits of ABI 1 (execute ... make_sym), then refer (2) and truncate (3).
    everything = (1 << 13) - 1 | (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0)
    read_file, read_dir, execute = 1 << 2, 1 << 3, 1 << 0
    on_files = everything & (execute | 1 << 1 | read_file | 1 << 14)
    attr = _RulesetAttr(everything)
    ruleset = _LIBC.syscall(_LANDLOCK_CREATE, ctypes.byref(attr), ctypes.c_size_t(ctypes.sizeof(attr)), 0)
    if ruleset < 0:
        return False
    for path, access in [*((p, execute | read_file | read_dir) for p in readable), (writable, everything)]:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            access &= on_files
        rule = _PathBeneath(access, descriptor)
        _LIBC.syscall(_LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0)
        os.close(descriptor)
    return bool(_LIBC.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _seccomp() -> bool:
    """A classic BPF program over the system call: foreign architectures die, the denied calls answer EPERM.

    No process can be started, so there is no fork bomb to count; threads are bounded by the address space.
    """
    machine = platform.machine()
    if machine not in _AUDIT:
        return False
    column = 0 if machine == "x86_64" else 1
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, deny, absent, allow = 0x80000000, 0x00050001, 0x00050026, 0x7FFF0000
    number, architecture, first_argument = 0, 4, 16  # offsets in struct seccomp_data
    denied = [n[column] for n in _DENIED.values() if n[column] >= 0]
    code = [(load, 0, 0, architecture), (equal, 1, 0, _AUDIT[machine]), (give, 0, 0, kill), (load, 0, 0, number)]
    code += [(equal, 0, 1, _CLONE3), (give, 0, 0, absent)]
    code += [(equal, 0, 4, _CLONE[column]), (load, 0, 0, first_argument), (any_bit, 0, 1, _CLONE_THREAD)]
    code += [(give, 0, 0, allow), (give, 0, 0, deny)]
    code.append((at_least, len(denied) + 1, 0, 0x40000000))  # x32 calls share the architecture: deny them all
    code += [(equal, len(denied) - i, 0, n) for i, n in enumerate(denied)]
    code += [(give, 0, 0, allow), (give, 0, 0, deny)]
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = _Program(len(code), ctypes.cast(buffer, ctypes.c_void_p))
    return bool(_LIBC.prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0) == 0)


def _execute(request: dict[str, str]) -> None:
    sys.stdin = io.StringIO(request["stdin"])
    sys.argv = ["main.py"]
    namespace = {"__name__": "__main__", "__builtins__": __builtins__}
    code = 0
    try:
        exec(compile(request["code"], "main.py", "exec"), namespace)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 255)


if __name__ == "__main__":
    main()
