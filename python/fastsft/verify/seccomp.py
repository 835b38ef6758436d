"""A seccomp(2) filter that leaves a process computing, threads and its own files.

Runs in the sandboxed child, so standard library only. System call numbers are those of x86-64 and aarch64 Linux.
"""

from __future__ import annotations

import ctypes
import os
import struct

MACHINE = os.uname().machine
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = 1 if MACHINE == "aarch64" else 0  # of the pairs below

# Calls that answer EPERM: (x86-64, aarch64); -1 where the machine has none. What needs a capability is not listed:
# there are none left when the filter is in force.
_DENIED = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "io_uring_setup": (425, 425),
    # memory that no limit counts and that may outlive the process
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # where kernels have had their holes, but libraries may ask
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
}  # fmt: skip
# Calls that nobody makes by mistake, and that end the process: other processes' memory, mounts, namespaces (they give
# capabilities again).
_FATAL = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_tree_attr": (467, 467), "unshare": (272, 97), "setns": (308, 268),
    "bpf": (321, 280),
}  # fmt: skip
# New processes, and signals to others.
_PROCESSES = {
    "fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281), "setsid": (112, 157),
    "setpgid": (109, 154), "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
}  # fmt: skip
# Landlock rules on opening, not on metadata: without a root of its own, code could change mode and times of any file.
_METADATA = {
    "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, -1),
    "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54), "utime": (132, -1), "utimes": (235, -1),
    "futimesat": (261, -1), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
_CLONE, _CLONE_THREAD, _CLONE3 = (56, 220), 0x10000, (435, 435)
_CLONE_NEW = 0x7E020080  # the flags of all namespaces
_MMAP, _MAP_SHARED, _MAP_ANONYMOUS = (9, 222), 1, 0x20
_FIRST_UNKNOWN = 470  # calls newer than this file, and x86's x32 numbers

# Instructions of classic BPF (code, if true, if false, operand) and offsets in struct seccomp_data.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _EPERM, _ENOSYS, _ALLOW = ((_RETURN, 0, 0, k) for k in (0x80000000, 0x00050001, 0x00050026, 0x7FFF0000))
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

Instruction = tuple[int, int, int, int]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(*, deny_metadata: bool, allow_processes: bool) -> bool:
    """Filter this process from now on; False where the kernel does not. Needs no_new_privs, or a capability.

    Without ``allow_processes`` only threads can be started, and signals sent to itself; with it, the processes must be
    counted and bounded by a PID namespace.
    """
    if MACHINE not in _AUDIT:
        return False
    denied = _DENIED | ({} if allow_processes else _PROCESSES) | (_METADATA if deny_metadata else {})
    code = _program(denied, allow_processes)
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    program = _Program(len(code), ctypes.cast(ctypes.create_string_buffer(packed, len(packed)), ctypes.c_void_p))
    return bool(ctypes.CDLL(None).prctl(22, 2, ctypes.byref(program), 0, 0) == 0)  # PR_SET_SECCOMP, MODE_FILTER


def _program(denied: dict[str, tuple[int, int]], allow_processes: bool) -> list[Instruction]:
    code = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _AUDIT[MACHINE]), _KILL, (_LOAD, 0, 0, _NUMBER)]
    code += [(_AT_LEAST, 0, 1, _FIRST_UNKNOWN), _ENOSYS]
    # clone3 hides its flags from a filter, and libc falls back to clone on ENOSYS.
    code += [(_EQUAL, 0, 1, _CLONE3[_COLUMN]), _ENOSYS]
    if allow_processes:
        code += _by_argument(_CLONE, 0, [(_ANY_BIT, _CLONE_NEW)], _EPERM, _ALLOW)
        code += _no_shared_memory()
    else:
        code += _by_argument(_CLONE, 0, [(_ANY_BIT, _CLONE_THREAD)], _ALLOW, _EPERM)
        itself = [(_EQUAL, os.getpid())]
        code += _by_argument((234, 131), 0, itself, _ALLOW, _EPERM)  # tgkill, for abort() and raise()
        code += _by_argument((302, 261), 0, [(_EQUAL, 0), *itself], _ALLOW, _EPERM)  # prlimit64
    for numbers, argument, values, inside, outside in (
        ((53, 199), 1, (1, 0x80001), _ALLOW, _EPERM),  # socketpair of streams, for asyncio: they reach nobody else
        # The kernel would send a signal on the code's behalf:
        ((72, 25), 1, (8, 10, 15), _EPERM, _ALLOW),  # fcntl F_SETOWN, F_SETSIG, F_SETOWN_EX
        ((16, 29), 1, (0x8901, 0x8902), _EPERM, _ALLOW),  # ioctl FIOSETOWN, SIOCSPGRP
    ):
        code += _by_argument(numbers, argument, [(_EQUAL, value) for value in values], inside, outside)
    for calls, answer in ((denied, _EPERM), (_FATAL, _KILL)):
        for numbers in calls.values():
            if numbers[_COLUMN] >= 0:
                code += [(_EQUAL, 0, 1, numbers[_COLUMN]), answer]
    return [*code, _ALLOW]


def _no_shared_memory() -> list[Instruction]:
    """RLIMIT_DATA, unlike RLIMIT_AS, does not count memory that is both shared and anonymous."""
    body = [(_LOAD, 0, 0, _ARGUMENTS + 8 * 3), (_ANY_BIT, 0, 2, _MAP_SHARED), (_ANY_BIT, 0, 1, _MAP_ANONYMOUS)]
    return [(_EQUAL, 0, len(body) + 2, _MMAP[_COLUMN]), *body, _EPERM, _ALLOW]


def _by_argument(
    numbers: tuple[int, int], argument: int, tests: list[tuple[int, int]], inside: Instruction, outside: Instruction
) -> list[Instruction]:
    """``inside`` for this call if its argument (the low word, which comes first) passes any test, else ``outside``."""
    body = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
    for test, value in tests:
        body += [(test, 0, 1, value), inside]
    body.append(outside)
    return [(_EQUAL, 0, len(body), numbers[_COLUMN]), *body]
