"""The inside of the sandbox: started by ``sandbox.py``, it locks itself in and then executes the code it is given.

Standard library only (``-I -S``), and little of it, for a quick start. It speaks to the parent through one pipe: a line
with the layers in force, then a line with the parent's secret and how the code ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence

from fastsft.verify import seccomp

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
_CLONE_NEWNET, _CLONE_NEWIPC = 0x40000000, 0x8000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 2, 4, 0x1000, 0x4000, 1 << 18, 2
_AT_RECURSIVE, _MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 0x8000, 1, 2
# System calls without a wrapper in older C libraries; the newer ones have one number on all machines.
_PIVOT_ROOT = 41 if seccomp.MACHINE == "aarch64" else 155
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_RESERVE = 8 << 20  # bytes for the report and the traceback when the code has used up its memory
_USER = 1000  # who the code is inside its user namespace


def main() -> None:
    with open(0, "rb", closefd=False) as file:
        request = json.load(file)
    _replace_stdin(request["stdin"])
    _die_with_parent()
    if os.getppid() != request["parent"]:
        os._exit(1)  # it went before the line above
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    layers = ["limits"]
    if _namespaces(request["seconds"]):
        layers.append("namespaces")
        if _private_root(request["root"], request["folder"], request["readable"], request["file"]):
            layers.append("root")
    _check(_LIBC.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))  # even root keeps its user id and nothing else
    if request["memory"] < taken + _RESERVE:  # under such a limit the interpreter could not even report it
        os.write(request["report"], f"{' '.join(layers)}\n{request['secret']} memory\n".encode())
        os._exit(1)
    _limits(request["seconds"], request["memory"], request["file"])
    if _landlock(request["readable"], request["folder"]):
        layers.append("landlock")
    if seccomp.install(deny_metadata="root" not in layers):
        layers.append("seccomp")
    else:  # nothing else keeps the code from starting processes
        resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
    if not {"namespaces", "seccomp"} & set(layers) and not request["weaker"]:
        os.write(request["report"], b"refused\n")
        os._exit(1)
    os.write(request["report"], " ".join(layers).encode() + b"\n")
    _execute({"main.py": request["code"], "check.py": request["check"]}, request["report"], request["secret"])


def _replace_stdin(text: str) -> None:
    """Descriptor 0 held the request with its secret; from now on it is what the code reads."""
    file = os.memfd_create("stdin")
    with open(file, "wb", closefd=False) as stream:
        stream.write(text.encode("utf-8", "surrogatepass"))
    os.lseek(file, 0, os.SEEK_SET)
    os.dup2(file, 0)
    os.close(file)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _check(result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


# --- namespaces -------------------------------------------------------------------------------------------------------


def _namespaces(seconds: float) -> bool:
    """Move into fresh namespaces; the code then runs in a child, which is process 1 and takes its children with it."""
    uid, gid = os.getuid(), os.getgid()
    spaces = _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNS
    if _LIBC.unshare(spaces | _CLONE_NEWUSER) == 0:
        with contextlib.suppress(OSError):  # no /proc: the namespaces hold without a mapping, only mounts will fail
            for name, content in (
                ("setgroups", "deny"),
                ("uid_map", f"{_USER} {uid} 1"),
                ("gid_map", f"{_USER} {gid} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(content)
    elif _LIBC.unshare(spaces) != 0:  # a privileged user where user namespaces are switched off
        return False
    child = os.fork()
    if child == 0:
        _die_with_parent()
        return True
    # This process ends as its child did.
    _, status, usage = os.wait4(child, 0)
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    fatal = os.WTERMSIG(status)
    if fatal == signal.SIGKILL and usage.ru_utime + usage.ru_stime >= seconds:
        fatal = signal.SIGXCPU  # process 1 ignores that one and dies of the hard limit
    if fatal != signal.SIGKILL:
        signal.signal(fatal, signal.SIG_DFL)  # Python ignores some
    os.kill(os.getpid(), fatal)
    os._exit(1)


def _private_root(root: str, folder: str, readable: Sequence[str], file_bytes: int) -> bool:
    """A root with nothing in it but the readable paths, read-only, and the folder, in memory. Needs Linux 5.12."""
    try:
        _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
        _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
        done: list[str] = []
        for path in sorted([*readable, os.devnull]):
            if any(path.startswith(f"{parent}/") for parent in done):
                continue
            if os.path.isdir(path):
                os.makedirs(root + path, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(root + path), exist_ok=True)
                open(root + path, "w").close()
            _mount(path, root + path, None, _MS_BIND | _MS_REC)
            done.append(path)
        os.makedirs(root + folder, exist_ok=True)
        attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
        _check(_LIBC.syscall(_MOUNT_SETATTR, -1, root.encode(), _AT_RECURSIVE, attributes, ctypes.c_size_t(32)))
        _mount("tmpfs", root + folder, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={file_bytes},nr_inodes=4096,mode=700")
        os.chdir(root)
        _check(_LIBC.syscall(_PIVOT_ROOT, b".", b"."))  # puts the old root on top of the new one
    except OSError:  # mounts are forbidden here; what was mounted is seen by nobody else and hides nothing
        os.chdir(folder)
        return False
    _check(_LIBC.umount2(b".", _MNT_DETACH))
    os.chdir(folder)
    return True


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    source_, kind_, data_ = (None if text is None else os.fsencode(text) for text in (source, kind, data))
    _check(_LIBC.mount(source_, os.fsencode(target), kind_, ctypes.c_ulong(flags), data_))


# --- limits and rules -------------------------------------------------------------------------------------------------


def _limits(seconds: float, memory: int, file_bytes: int) -> None:
    cpu = int(seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory + _RESERVE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _landlock(readable: Sequence[str], writable: str) -> bool:
    version = _LIBC.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    # Bits 0 .. 12 (execute ... make_sym), then refer (ABI 2), truncate (3) and ioctl_dev (5).
    everything = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    execute, write_file, read_file, read_dir = 1 << 0, 1 << 1, 1 << 2, 1 << 3
    on_files = everything & (execute | write_file | read_file | 1 << 14 | 1 << 15)
    # handled_access_fs, handled_access_net (bind and connect, ABI 4), scoped (abstract sockets and signals, ABI 6)
    fields = [everything, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    ruleset = _LIBC.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    rules = [(path, execute | read_file | read_dir) for path in readable]
    rules += [(writable, everything), (os.devnull, read_file | write_file)]
    for path, access in rules:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = _PathBeneath(access if os.path.isdir(path) else access & on_files, descriptor)
        _check(_LIBC.syscall(_LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0))
        os.close(descriptor)
    restricted: bool = _LIBC.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return restricted


# --- the code ---------------------------------------------------------------------------------------------------------


def _execute(sources: dict[str, str], report: int, secret: str) -> None:
    """Run the sources as one ``__main__`` module, report how they ended, and exit as a script would."""
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["main.py"]
    error: BaseException | None = None
    verdict, code = "ok", 0
    with_reserve = (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2
    try:
        for name, source in sources.items():
            exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
    except SystemExit as end:
        verdict = "exit"
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException as caught:
        resource.setrlimit(resource.RLIMIT_AS, with_reserve)
        error, verdict, code = caught, "memory" if isinstance(caught, MemoryError) else "raised", 1
    with contextlib.suppress(OSError):  # the code may have closed it; then there is no verdict
        os.write(report, f"{secret} {verdict}\n".encode())
    if error is not None:
        _print_exception(error, sources)
    sys.exit(code & 255)


def _print_exception(error: BaseException, sources: dict[str, str]) -> None:
    import linecache
    import traceback

    for name, source in sources.items():
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    own = error.__traceback__
    traceback.print_exception(type(error), error, own and own.tb_next)
