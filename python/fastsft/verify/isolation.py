"""The kernel's walls around untrusted code: namespaces, a root of its own, Landlock rules, dropped privileges.

Standard library only: it runs in processes of the sandbox, which keep away from everything that starts slowly.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Callable, Sequence

from fastsft.verify import seccomp

_LIBC = ctypes.CDLL(None, use_errno=True)
# Keeps the interpreter's lock: a process made by clone(2) must hold it, and os.fork knows no namespaces.
_HELD_LIBC = ctypes.PyDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
_CLONE_NEWNET, _CLONE_NEWIPC = 0x40000000, 0x8000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_MOVE, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 2, 4, 0x1000, 0x2000, 0x4000, 1 << 18, 2
_AT_RECURSIVE, _MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 0x8000, 1, 2
# System calls without a wrapper in older C libraries; the newer ones have one number on all machines.
_ARM = seccomp.MACHINE == "aarch64"
_PIVOT_ROOT, _CLONE = (41, 220) if _ARM else (155, 56)
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
USER = 1000  # who the code is inside its user namespace
NOBODY = 65534  # and who that is outside, where root started the sandbox: the kernel does not count root's processes


def check(result: int) -> None:
    """Raise the OSError of a system call that did not return 0."""
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def die_with_parent() -> None:
    """To be called after a change of user, which clears it."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


# --- namespaces -------------------------------------------------------------------------------------------------------


def enter_namespaces(mapped_from_outside: Callable[[], bool]) -> tuple[bool, bool]:
    """Move this process into its own user, network, IPC and mount namespaces.

    Args:
        mapped_from_outside: asks a privileged process outside to map users 0 and ``USER`` (to ``NOBODY``); says whether
            it did.

    Returns:
        Whether it happened, and whether ``USER`` is somebody else than this process.
    """
    uid, gid = os.getuid(), os.getgid()
    spaces = _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWNS
    if _LIBC.unshare(spaces | _CLONE_NEWUSER) != 0:
        # A privileged user where user namespaces are switched off.
        return _LIBC.unshare(spaces) == 0, False
    if uid == 0 and mapped_from_outside():
        return True, True
    try:
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{USER} {uid} 1"),
            ("gid_map", f"{USER} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)
    except OSError:
        pass  # no /proc: the namespaces hold without a mapping, only mounts will fail
    return True, False


def fork(*, own_processes: bool) -> int:
    """As os.fork; with ``own_processes`` the child is process 1 of a new PID namespace and takes its children along."""
    if not own_processes:
        return os.fork()
    child: int = _HELD_LIBC.syscall(_CLONE, ctypes.c_ulong(_CLONE_NEWPID | signal.SIGCHLD), 0, 0, 0, 0)
    if child < 0:
        check(child)
    return child


# --- files ------------------------------------------------------------------------------------------------------------


def enter_private_root(root: str, folders: Sequence[str], readable: Sequence[str]) -> bool:
    """A root with nothing in it but the readable paths, read-only, and empty folders to mount on. Needs Linux 5.12."""
    try:
        mount(None, "/", None, _MS_REC | _MS_PRIVATE)
        mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
        done: list[str] = []
        for path in sorted([*readable, os.devnull]):
            if any(path.startswith(f"{parent}/") for parent in done):
                continue
            if os.path.isdir(path):
                os.makedirs(root + path, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(root + path), exist_ok=True)
                open(root + path, "w").close()
            mount(path, root + path, None, _MS_BIND | _MS_REC)
            done.append(path)
        for folder in folders:
            os.makedirs(root + folder, exist_ok=True)
        attributes = struct.pack("QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
        check(_LIBC.syscall(_MOUNT_SETATTR, -1, root.encode(), _AT_RECURSIVE, attributes, ctypes.c_size_t(32)))
        os.chdir(root)
        check(_LIBC.syscall(_PIVOT_ROOT, b".", b"."))  # puts the old root on top of the new one
    except OSError:  # mounts are forbidden here; what was mounted is seen by nobody else and hides nothing
        return False
    check(_LIBC.umount2(b".", _MNT_DETACH))
    os.chdir("/")
    return True


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    source_, kind_, data_ = (None if text is None else os.fsencode(text) for text in (source, kind, data))
    check(_LIBC.mount(source_, os.fsencode(target), kind_, ctypes.c_ulong(flags), data_))


def mount_memory(folder: str, size: int, owner: int) -> None:
    """An empty file system of bounded size in memory."""
    data = f"size={size},nr_inodes=4096,mode=700,uid={owner},gid={owner}"
    mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, data)


def move_mount(source: str, target: str) -> None:
    mount(source, target, None, _MS_MOVE)


def unmount(folder: str) -> None:
    check(_LIBC.umount2(os.fsencode(folder), _MNT_DETACH))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def landlock(readable: Sequence[str], writable: str) -> bool:
    """Rules for this process from now on; False where the kernel has none. Needs no_new_privs."""
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
        check(_LIBC.syscall(_LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0))
        os.close(descriptor)
    restricted: bool = _LIBC.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0
    os.close(ruleset)
    return restricted


# --- privileges -------------------------------------------------------------------------------------------------------


def drop_privileges(*, become_user: bool) -> None:
    """No capabilities and no way to new ones. Even root keeps its user id and nothing else."""
    if become_user:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
    check(_LIBC.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    die_with_parent()
