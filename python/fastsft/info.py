"""What is built, what was found, which implementation serves each op, and why."""

from __future__ import annotations

import os
import sys
from typing import Any


def info() -> dict[str, Any]:
    """Describe this installation and machine as a JSON-serialisable dict.

    Keys: ``fastsft``, ``python``, ``platform``, ``packages`` (name -> version or None), ``cpu`` (instruction sets,
    threads, cores), ``cuda`` (built for, devices that torch can use, torch's version, ``gpus`` as the driver describes
    them or ``gpus_unread``, the reason why not), ``build`` (compiler) and ``ops`` (op -> device ->
    ``{"kind", "reason"}``; kind is ``native``, ``triton``, ``torch`` or ``none``).
    """
    import importlib
    import platform

    import torch

    from fastsft import _C, __version__, ops
    from fastsft.gpu import gpus
    from fastsft.ops._registry import REGISTRY

    for op in ops.__all__:  # each is recorded where it is defined
        getattr(ops, op)
    for module in ("decoder", "device_linear"):  # the engine's
        importlib.import_module(f"fastsft.ops.{module}")

    try:
        found, unread = gpus(), None
    except RuntimeError as error:
        found, unread = [], str(error)
    return {
        "fastsft": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _REPORTED_PACKAGES},
        "cpu": {
            "isa_available": _C.available_isas(),
            "isa_active": _C.active_isa(),
            "threads": _C.num_threads(),
            "cores": os.cpu_count(),
        },
        "cuda": {
            "built_for": _C.cuda_architectures() or None,
            "devices": torch.cuda.device_count(),
            "torch": torch.version.cuda,
            "gpus": found,
            "gpus_unread": unread,
        },
        "build": {"compiler": _C.compiler()},
        "ops": {
            op: {device: {"kind": i.kind, "reason": i.reason} for device, i in sorted(where.items())}
            for op, where in sorted(REGISTRY.items())
        },
    }


_REPORTED_PACKAGES = (
    "torch", "numpy", "tokenizers", "safetensors", "transformers", "triton", "cuda-python", "pyarrow", "datasets",
    "matplotlib",
)  # fmt: skip


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
