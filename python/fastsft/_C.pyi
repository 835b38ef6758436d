"""
Native kernels of fastsft. Private: call fastsft.ops, which checks devices and registers autograd.
"""
from __future__ import annotations
import typing
__all__: list[str] = ['active_isa', 'available_isas', 'compiler', 'cuda_architectures', 'cuda_device_count', 'describe', 'num_threads', 'set_isa', 'set_num_threads']
def active_isa() -> str:
    ...
def available_isas() -> list[str]:
    ...
def compiler() -> str:
    ...
def cuda_architectures() -> str:
    """
    Architectures compiled in, or '' for a CPU-only build.
    """
def cuda_device_count() -> int:
    """
    Usable devices; -1 without a driver or in a CPU-only build.
    """
def describe(tensor: typing.Any) -> str:
    """
    How the bindings see a tensor: dtype, shape, device.
    """
def num_threads() -> int:
    ...
def set_isa(name: str) -> None:
    ...
def set_num_threads(n: typing.SupportsInt | typing.SupportsIndex) -> None:
    ...
