"""What is said of the GPUs: with a driver that answers as an H100 does, with none, and with the one that is here."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import fastsft
from fastsft.gpu import gpus

H100 = {
    "COMPUTE_CAPABILITY_MAJOR": 9,
    "COMPUTE_CAPABILITY_MINOR": 0,
    "MULTIPROCESSOR_COUNT": 132,
    "L2_CACHE_SIZE": 50 << 20,
    "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR": 228 << 10,
    "MEMORY_CLOCK_RATE": 2_619_000,
    "GLOBAL_MEMORY_BUS_WIDTH": 5120,
}


def install(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    driver = ModuleType("cuda.bindings.driver")
    answers: dict[str, Any] = {
        "CUdevice_attribute": SimpleNamespace(**{f"CU_DEVICE_ATTRIBUTE_{name}": name for name in H100}),
        "cuInit": lambda flags: (0,),
        "cuDeviceGetCount": lambda: (0, 2),
        "cuDeviceGet": lambda ordinal: (0, ordinal),
        "cuDeviceGetName": lambda length, device: (0, f"NVIDIA H100 no. {device}".encode().ljust(length, b"\0")),
        "cuDeviceTotalMem": lambda device: (0, 80 << 30),
        "cuDeviceGetAttribute": lambda name, device: (0, H100[name]),
        **changes,
    }
    for name, answer in answers.items():
        setattr(driver, name, answer)
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)


def test_figures_and_units(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    found = gpus()
    assert [gpu.pop("name") for gpu in found] == ["NVIDIA H100 no. 0", "NVIDIA H100 no. 1"]
    # 3.35 TB/s in the data sheet
    expected = {"capability": "9.0", "multiprocessors": 132, "memory_gib": 80.0, "l2_mib": 50.0,
                "shared_memory_kib": 228, "memory_gbytes_per_s": 3352}  # fmt: skip
    assert found == [expected, expected]
    assert len(fastsft.info()["cuda"]["gpus"]) == 2
    assert fastsft.info()["cuda"]["gpus_unread"] is None


def test_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, cuInit=lambda flags: (100,))
    with pytest.raises(RuntimeError, match=r"no usable driver: .*: 100"):
        gpus()

    def absent(flags: int) -> tuple[int]:
        raise RuntimeError("libcuda.so.1 not found")

    install(monkeypatch, cuInit=absent)
    assert fastsft.info()["cuda"]["gpus"] == []
    assert fastsft.info()["cuda"]["gpus_unread"] == "no usable driver: libcuda.so.1 not found"
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert fastsft.info()["cuda"]["gpus_unread"].startswith("cuda-python is not installed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver() -> None:
    pytest.importorskip("cuda.bindings")
    assert fastsft.info()["cuda"]["gpus_unread"].startswith("no usable driver: ")


@pytest.mark.gpu
def test_agrees_with_torch() -> None:
    pytest.importorskip("cuda.bindings")
    for ordinal, gpu in enumerate(gpus()):
        p = torch.cuda.get_device_properties(ordinal)
        assert gpu["name"] == p.name
        assert gpu["capability"] == f"{p.major}.{p.minor}"
        assert gpu["multiprocessors"] == p.multi_processor_count
        assert gpu["memory_gib"] == round(p.total_memory / 2**30, 1)
        assert gpu["l2_mib"] == round(p.L2_cache_size / 2**20, 1)
