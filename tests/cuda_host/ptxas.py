"""Compiles every CUDA kernel and prints what the assembler says of it: registers, shared memory, local memory.

    python tests/cuda_host/ptxas.py [architecture ...]      by default 80 and 90a; the release also has 100 and 120

Fails if a kernel uses local memory (spills, or an array indexed at run time), or if the assembler had to serialise
wgmma products or ignore setmaxnreg. Needs nvcc, no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ("80", "90a")

# Part of a kernel's name -> why local memory is all right there.
ALLOWED: dict[str, str] = {}


@dataclass
class Kernel:
    source: str
    architecture: str
    name: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0


def compile_file(nvcc: str, source: Path, architecture: str) -> tuple[list[Kernel], list[str]]:
    """The kernels of one file, and the assembler's complaints."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++20", "-O3", "-cubin", "-Xptxas", "-v", f"-I{ROOT / 'csrc/include'}"]
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
        command += ['-DFASTSFT_CUDA_ARCHITECTURES=""', "-o", f"{folder}/out", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{source.name} for sm_{architecture}:\n{done.stdout}{done.stderr}")
    kernels: dict[str, Kernel] = {}
    complaints = []
    current = ""
    for line in done.stderr.splitlines():
        # C7508: setmaxnreg ignored; "Potential Performance Loss": wgmma serialised
        if "warning" in line.lower() or "C7508" in line or "Performance Loss" in line:
            complaints.append(f"{source.name}, sm_{architecture}: {line}")
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            current = match[1]
            kernels[current] = Kernel(source.name, architecture, current)
        elif match := re.search(r"Function properties for (\w+)", line):
            current = match[1]
        elif current not in kernels:
            continue  # a function that was not inlined
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[current].stack = int(match[1])
            kernels[current].spills = int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            kernels[current].registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[current].shared = int(shared[1]) if shared else 0
    return list(kernels.values()), complaints


def demangle(kernels: list[Kernel]) -> None:
    if shutil.which("c++filt") is None:
        return
    names = "\n".join(k.name for k in kernels)
    plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
    for kernel, name in zip(kernels, plain, strict=True):
        short = re.sub(r"fastsft::cuda::|\(anonymous namespace\)::|^void ", "", name)
        kernel.name = re.sub(r"\(.*", "", re.sub(r"\((?:int|bool|unsigned int|fastsft::\w+)\)", "", short))


def main() -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("no nvcc: nothing to check")
        return
    jobs = [(source, a) for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) for a in sys.argv[1:] or DEFAULT]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: compile_file(nvcc, *job), jobs))
    kernels = [kernel for found, _ in results for kernel in found]
    complaints = [line for _, lines in results for line in lines]
    demangle(kernels)
    width = max([len(k.name) for k in kernels] + [6])
    print(f"{'kernel':{width}}  {'arch':5}  registers  static shared  stack  spills")
    for k in kernels:
        print(f"{k.name:{width}}  {k.architecture:5}  {k.registers:9}  {k.shared:13}  {k.stack:5}  {k.spills:6}")
        if (k.stack or k.spills) and not any(part in k.name for part in ALLOWED):
            complaints.append(f"{k.source}, sm_{k.architecture}: {k.name} uses local memory")
    if complaints:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
