"""One run inside the sandbox: a process forked by ``supervisor.py`` locks itself in and executes what it was given.

Standard library only. It speaks to the supervisor through one pipe: a line with the layers in force and
the time, then a line with the supervisor's secret and how the code ended.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from fastsft.verify import isolation, seccomp

_RESERVE = 8 << 20  # bytes for the report and the traceback when the code has used up its memory


@dataclass
class Job:
    """What a forked process is to do. ``report`` is its end of the pipe, ``taken`` the supervisor's address space."""

    request: dict[str, Any]
    folder: str
    layers: list[str]
    other_user: bool
    report: int
    taken: int


def main(job: Job) -> None:
    """Lock this process in and run the job; ends as the code does."""
    request = job.request
    if "argv" in request:
        _as_first_process(job)
    lock_in(job)
    if "argv" in request:
        _exec(job)
    _execute({"main.py": request["code"], "check.py": request["check"]}, job.report, request["secret"])


def lock_in(job: Job) -> None:
    request, layers = job.request, job.layers
    os.chdir(job.folder)
    isolation.drop_privileges(become_user=job.other_user)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    command = "argv" in request
    if not command and request["memory"] < job.taken + _RESERVE:  # under such a limit it could not even report it
        os.write(job.report, f"{' '.join(layers)} {time.monotonic()}\n{request['secret']} memory\n".encode())
        os._exit(1)
    _limits(request, command)
    if isolation.landlock(request["readable"], job.folder):
        layers.append("landlock")
    if seccomp.install(deny_metadata="root" not in layers, allow_processes=command):
        layers.append("seccomp")
    if (command and "namespaces" not in layers) or not ({"namespaces", "seccomp"} & set(layers) or request["weaker"]):
        os.write(job.report, b"refused\n")
        os._exit(1)
    os.write(job.report, f"{' '.join(layers)} {time.monotonic()}\n".encode())


def _limits(request: dict[str, Any], command: bool) -> None:
    cpu, memory, size = int(request["seconds"]) + 1, request["memory"], request["file"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    if command:  # not the address space, of which some languages reserve more than they will ever use
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    else:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory + _RESERVE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    files = 256 if command else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    resource.setrlimit(resource.RLIMIT_NPROC, (request["processes"],) * 2)


# --- a command --------------------------------------------------------------------------------------------------------


def _as_first_process(job: Job) -> None:
    """Return in a child, which runs the command. Process 1 stays here: it waits, reports, and takes all with it."""
    child = os.fork()
    if child == 0:
        os.setsid()
        return
    for descriptor in range(3):
        os.close(descriptor)
    while True:
        pid, status, usage = os.wait4(-1, 0)  # orphans come here too
        if pid == child:
            break
    code = os.waitstatus_to_exitcode(status)
    line = f"{job.request['secret']} exit {code} {usage.ru_maxrss << 10} {usage.ru_utime + usage.ru_stime}\n"
    os.write(job.report, line.encode())
    os._exit(0)


def _exec(job: Job) -> None:
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": job.folder, "TMPDIR": job.folder, "LANG": "C.UTF-8"}
    os.set_inheritable(job.report, False)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores these two, and what is ignored is inherited
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvpe(job.request["argv"][0], job.request["argv"], environment)
    except OSError as error:
        os.write(job.report, f"{job.request['secret']} exec {error.strerror}\n".encode())
        os._exit(127)


# --- Python -----------------------------------------------------------------------------------------------------------


def _execute(sources: dict[str, str], report: int, secret: str) -> None:
    """Run the sources as one ``__main__`` module, report how they ended, and exit as a script would."""
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["main.py"]
    error: BaseException | None = None
    verdict, code, name = "ok", 0, ""
    with_reserve = (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2
    try:
        for name, source in sources.items():
            verdict = "compile_error"
            compiled = compile(source, name, "exec", dont_inherit=True)
            verdict = "ok"
            exec(compiled, module.__dict__)
    except SystemExit as end:
        verdict = "exit"
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException as caught:
        resource.setrlimit(resource.RLIMIT_AS, with_reserve)
        error, code = caught, 1
        if verdict == "ok" or isinstance(caught, MemoryError):
            verdict = _verdict(caught, name)
    with contextlib.suppress(OSError):  # the code may have closed it; then there is no verdict
        os.write(report, f"{secret} {verdict}\n".encode())
    if error is not None:
        _print_exception(error, sources)
    _leave(code & 255)


def _leave(code: int) -> None:
    """As the interpreter's own exit, but for taking down every module, which would touch (and so copy) each page that
    is shared with the supervisor."""
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # closed, or replaced by the code
            code = code or 120
    os._exit(code)


def _verdict(error: BaseException, where: str) -> str:
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, PermissionError):
        return "violation"
    return "wrong" if isinstance(error, AssertionError) and where == "check.py" else "raised"


def _print_exception(error: BaseException, sources: dict[str, str]) -> None:
    import linecache
    import traceback

    for name, source in sources.items():
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    own = error.__traceback__
    traceback.print_exception(type(error), error, own and own.tb_next)
