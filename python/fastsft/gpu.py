"""What the CUDA driver says of the GPUs present, asked through cuda-python.

Not torch: 2.6, the oldest supported, says neither the memory's clock nor its bus width, and to ask it makes a context,
which takes a second and some of the GPU's memory.
"""

from __future__ import annotations

from typing import Any


def gpus() -> list[dict[str, Any]]:
    """One dict per device, in the order of CUDA's ordinals.

    Keys: ``name``, ``capability``, ``multiprocessors``, ``memory_gib``, ``l2_mib``, ``shared_memory_kib`` (of a
    multiprocessor) and ``memory_gbytes_per_s``, the memory's rate as its clock and its bus have it.

    Raises:
        RuntimeError: cuda-python is not installed, or there is no usable driver; says which.
    """
    try:
        from cuda.bindings import driver
    except ImportError:
        raise RuntimeError("cuda-python is not installed: pip install 'fastsft[cuda]'") from None
    try:
        _ask(driver.cuInit, 0)
    except RuntimeError as error:
        raise RuntimeError(f"no usable driver: {error}") from None
    return [_describe(driver, _ask(driver.cuDeviceGet, i)) for i in range(_ask(driver.cuDeviceGetCount))]


def _ask(function: Any, *arguments: Any) -> Any:
    status, *answer = function(*arguments)
    if int(status) != 0:
        raise RuntimeError(f"{function.__name__}: {getattr(status, 'name', status)}")
    return answer[0] if answer else None


def _describe(driver: Any, device: Any) -> dict[str, Any]:
    def attribute(name: str) -> int:
        kind = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(_ask(driver.cuDeviceGetAttribute, kind, device))

    kilohertz, bits = attribute("MEMORY_CLOCK_RATE"), attribute("GLOBAL_MEMORY_BUS_WIDTH")
    major, minor = attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")
    return {
        "name": _ask(driver.cuDeviceGetName, 256, device).partition(b"\0")[0].decode(),
        "capability": f"{major}.{minor}",
        "multiprocessors": attribute("MULTIPROCESSOR_COUNT"),
        "memory_gib": round(_ask(driver.cuDeviceTotalMem, device) / 2**30, 1),
        "l2_mib": round(attribute("L2_CACHE_SIZE") / 2**20, 1),
        "shared_memory_kib": attribute("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR") // 1024,
        "memory_gbytes_per_s": round(2 * kilohertz * 1e3 * bits / 8 / 1e9),  # two transfers a clock
    }
