"""The contestants of ``bench_engine.py`` as processes that wait for their turn."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from engine_case import Case, write_model
from rivals import has, python_with

MODULES = {
    "llama.cpp": ("llama_cpp", "gguf"),
    "OpenVINO GenAI": ("openvino_genai", "optimum.intel"),
    "CTranslate2": ("ctranslate2",),
    "vLLM": ("vllm",),
    "transformers": ("transformers",),
}
FORMATS = {
    "CTranslate2": ("float32", "int8"),  # its other formats have no kernels on a CPU
    "vLLM": ("float32", "bfloat16"),
    "transformers": ("float32", "bfloat16"),
}
CHILD = Path(__file__).with_name("engine_contestants.py")


@functools.cache
def interpreter(contestant: str) -> str | None:
    """The Python that it runs in, if it is installed."""
    modules = MODULES.get(contestant.removesuffix(", step"), ())
    if contestant.startswith("fastsft") or contestant == "transformers":
        return sys.executable if has(sys.executable, modules) else None
    return python_with(*modules)


def takes_part(contestant: str, case: Case) -> bool:
    return case.format in FORMATS.get(contestant, (case.format,)) and interpreter(contestant) is not None


@functools.cache
def model(size: str) -> Path:
    """The folder; the forms that rivals read are written beside it."""
    folder = Path(os.environ.get("FASTSFT_BENCH_MODELS") or tempfile.mkdtemp(prefix="fastsft-bench-"))
    folder = folder / size.replace(" ", "") / "model"
    if not folder.exists():
        folder.parent.mkdir(parents=True)
        write_model(size, folder)
    return folder


class Child:
    """A contestant at work on one case."""

    def __init__(self, contestant: str, case: Case) -> None:
        threads = str(case.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "FASTSFT_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        python = interpreter(contestant)
        assert python is not None
        command = [python, CHILD, contestant, case.size, case.format, threads, model(case.size)]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
        )

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the contestant and wait for what it returns."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([method, *arguments]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(self.errors.read()[-3000:])
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Children:
    """Those of one case at a time: models of a case that is done with are let go."""

    def __init__(self) -> None:
        self.case: Case | None = None
        self.running: dict[str, Child] = {}

    def of(self, contestant: str, case: Case) -> Child:
        if case != self.case:
            self.close()
            self.case = case
        if contestant not in self.running:
            self.running[contestant] = Child(contestant, case)
        return self.running[contestant]

    def close(self) -> None:
        for child in self.running.values():
            child.close()
        self.running = {}
