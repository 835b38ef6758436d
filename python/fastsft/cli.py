"""The command line: finds the verb, reads its flags with tyro, and turns the user's mistakes into one message."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from fastsft import verbs
from fastsft.verbs import UsageError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

# What is not installed with the package, and the extra that brings it.
EXTRAS = {
    "datasets": "data", "fastapi": "serve", "prometheus_client": "serve", "pyarrow": "data", "ray": "ray",
    "tree_sitter": "data", "tree_sitter_python": "data", "uvicorn": "serve",
}  # fmt: skip
VERBS: dict[str, tuple[Callable[..., None], bool]] = {
    "info": (verbs.info, False),
    "demo": (verbs.demo, False),
    "dedup": (verbs.dedup, False),
    "decontaminate": (verbs.decontaminate, False),
    "prepare": (verbs.prepare, True),
    "train": (verbs.train, True),
    "report": (verbs.report, False),
    "generate": (verbs.generate, False),
    "serve": (verbs.serve, False),
    "eval": (verbs.evaluate, False),
    "sample": (verbs.sample, False),
    "iterate": (verbs.iterate, False),
    "bench": (verbs.bench, False),
    "bench list": (verbs.bench_list, False),
    "bench compare": (verbs.bench_compare, False),
    "check": (verbs.check, False),
    "soup": (verbs.soup, False),
    "restore-layers": (verbs.restore_layers, False),
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``fastsft`` command. User errors exit with 2 and one message."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    if arguments[0] == "--version":
        from fastsft import __version__

        print(__version__)
        return
    words = 2 if " ".join(arguments[:2]) in VERBS else 1
    verb, rest = " ".join(arguments[:words]), ["--output" if a == "-o" else a for a in arguments[words:]]
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"fastsft --help lists {', '.join(VERBS)}"
        _fail(f"unknown verb {verb!r}; {hint}")
    function, takes_config = VERBS[verb]
    from fastsft._C import keep_freed_memory
    from fastsft.config import ConfigError
    from fastsft.data.records import DataError
    from fastsft.models.template import TemplateError

    keep_freed_memory()
    try:
        if takes_config:
            _run_with_config(verb, function, rest)
        else:
            _cli(function, verb, rest)
    except SystemExit as stop:
        if stop.code in (EXIT_INTERRUPTED, EXIT_TERMINATED):  # the trainer's, after it saved its step
            _say_interrupted(verb)
        raise
    except KeyboardInterrupt:
        _say_interrupted(verb)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:  # the reader of our output went away (`fastsft info | head -1`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered has nowhere to go
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        _fail(f"{verb}: needs {missing}: pip install 'fastsft[{EXTRAS[missing]}]'")
    except (UsageError, ConfigError, DataError, TemplateError, FloatingPointError) as error:
        _fail(str(error))
    except ValueError as error:
        # A contract of ours that the input broke has its raise in our code; anything deeper keeps its traceback.
        import traceback

        if not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(os.path.dirname(__file__) + os.sep):
            raise
        _fail(str(error))


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {(f.__doc__ or '').splitlines()[0]}" for verb, (f, _) in VERBS.items()]
    return "usage: fastsft VERB ...\n\n" + "\n".join(lines) + "\n\nfastsft VERB --help shows a verb's options."


def _cli(function: Callable[..., None], verb: str, arguments: list[str]) -> None:
    import tyro

    tyro.cli(function, prog=f"fastsft {verb}", args=arguments)


def _run_with_config(verb: str, function: Callable[..., None], arguments: list[str]) -> None:
    """``fastsft train run.toml [--data PATH ...] [--section.key value ...]``: the file gives the flags' defaults."""
    import tyro

    from fastsft.config import Config, load_config, to_dict

    path = arguments[0] if arguments and not arguments[0].startswith("-") else None
    rest = ["--data.train" if a == "--data" else a for a in arguments[1 if path else 0 :]]
    options: dict[str, Any] = {}
    if "--json" in rest:
        rest.remove("--json")
        options["json"] = True
    if verb == "train" and "--dry-run" in rest:
        rest.remove("--dry-run")
        options["dry_run"] = True
    if verb == "prepare" and "--show" in rest:
        at = rest.index("--show")
        count = rest[at + 1] if at + 1 < len(rest) else "nothing"
        if not count.isdecimal():
            raise UsageError(f"prepare: --show: expected a number of samples, got {count}")
        options["show"] = int(count)
        del rest[at : at + 2]
    default = load_config(path) if path else Config()
    config = tyro.cli(
        Config,
        prog=f"fastsft {verb} [RUN.toml] [--json]" + {"prepare": " [--show N]", "train": " [--dry-run]"}[verb],
        description=f"{(function.__doc__ or '').splitlines()[0]} --data PATH ... is short for --data.train.",
        default=default,
        args=rest,
        config=(tyro.conf.SuppressFixed, tyro.conf.FlagConversionOff),
    )
    function(load_config(to_dict(config)), **options)


def _say_interrupted(verb: str) -> None:
    goes_on = {"train": "goes on from the newest checkpoint, if there is one", "sample": "goes on where it was",
               "iterate": "goes on where it was"}  # fmt: skip
    after = goes_on.get(verb, "begins anew")
    print(f"\nfastsft: interrupted; the same command {after}", file=sys.stderr)


def _fail(message: str) -> NoReturn:
    print(f"fastsft: {message}", file=sys.stderr)
    raise SystemExit(EXIT_USAGE)
