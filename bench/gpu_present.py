"""What to build for the GPU present, as CMAKE_CUDA_ARCHITECTURES has it: ``python bench/gpu_present.py``.

Needs torch alone, so that it can be asked before anything is built.
"""

from __future__ import annotations

import sys

import torch


def require_gpu() -> None:
    """Ends the program with the reason where there is none."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or "not built in"
        sys.exit(f"no usable GPU: torch {torch.__version__} (CUDA: {built}) sees no device")


def architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real"  # 90a: with Hopper's own instructions


if __name__ == "__main__":
    require_gpu()
    print(architecture())
