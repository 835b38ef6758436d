"""The Triton kernels without a GPU: their results under Triton's interpreter, their machine code from its compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def test_interpreted() -> None:
    """In a process of its own: Triton reads the variable when it is imported, and then no kernel is compiled."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "triton_cases.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def kernels() -> dict[str, tuple[Any, dict[str, int], int]]:
    """Name -> kernel, its constants, its warps: as launched at ordinary widths."""
    from fastsft.ops._triton import activation, norm, rope, sampling

    rows, block, warps = norm._tile(4096)
    tile = {"WIDTH": 4096, "ROWS": rows, "BLOCK": block}
    turn = {"HEADS": 14, "HALF": 40, "ROWS": 16, "BLOCK": 64, "INVERSE": True}
    return {
        "norm": (norm._forward, tile, warps),
        "norm backward": (norm._backward, tile, warps),
        "sum of parts": (norm._sum_parts, {"WIDTH": 4096, "COUNT": norm._PARTS, "BLOCK": 32}, 8),
        "rope": (rope._rotate, turn, 4),
        "swiglu": (activation._forward, {"BLOCK": activation._BLOCK}, activation._WARPS),
        "swiglu backward": (activation._backward, {"BLOCK": activation._BLOCK}, activation._WARPS),
        "swiglu of halves": (activation._halves, {"BLOCK": activation._BLOCK}, activation._WARPS),
        "draw": (sampling._best, {"CHUNKS": 38, "BLOCK": sampling._BLOCK}, sampling._WARPS),
    }


NUMBERS = {
    "rows": "i32",
    "count": "i32",
    "size": "i32",
    "width": "i32",
    "vocab": "i32",
    "token_stride": "i32",
    "head_stride": "i32",
    "eps": "fp32",
}
FLOAT32 = {"scale", "parts", "scores", "temperature", "best"}  # whatever the type of x
INT64 = {"seeds", "positions", "index"}
WRITES_LITTLE = {"sum of parts", "draw"}
NOT_SPECIALISED = {"rows", "count", "eps"}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compiled(dtype: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To machine code, whose accesses to rows are 16 bytes wide."""
    triton = pytest.importorskip("triton", "3.3", reason="ASTSource takes other arguments before")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, (kernel, constants, warps) in kernels().items():
        signature = {
            argument: "constexpr"
            if argument in constants
            else NUMBERS.get(argument, "*fp32" if argument in FLOAT32 else "*i64" if argument in INT64 else f"*{dtype}")
            for argument in kernel.arg_names
        }
        by_16 = {
            (i,): [["tt.divisibility", 16]]
            for i, argument in enumerate(kernel.arg_names)
            if argument not in constants.keys() | NOT_SPECIALISED
        }
        source = ASTSource(kernel, signature, constexprs=constants, attrs=by_16)
        options = {"num_warps": warps, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.asm["cubin"], name
        assert "ld.global.v4.b32" in compiled.asm["ptx"], name
        assert name in WRITES_LITTLE or "st.global.v4.b32" in compiled.asm["ptx"], name


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_products_are_compiled(
    name: str, rows: int, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To matrix instructions on weights that come 16 bytes at a time while others are multiplied."""
    triton = pytest.importorskip("triton", "3.3", reason="ASTSource takes other arguments before")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastsft.ops._triton import device_linear

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel: Any = {"int8": device_linear._int8, "int4": device_linear._int4}[name]
    constants = device_linear.tile_of(rows) | ({"GROUP": 32} if name == "int4" else {})
    pointers = {"x": "*bf16", "data": "*i8" if name == "int8" else "*u8", "scales": "*bf16", "sums": "*fp32"}
    signature = {a: "constexpr" if a in constants else pointers.get(a, "i32") for a in kernel.arg_names}
    by_16 = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if argument not in constants.keys() | {"rows"}
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=by_16)
    options = {"num_warps": device_linear._WARPS, "num_stages": device_linear._STAGES, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    assert "cp.async.cg.shared.global" in compiled.asm["ptx"]
    assert any(f"{kind}.sync.aligned" in compiled.asm["ptx"] for kind in ("mma", "wgmma.mma_async"))
    assert compiled.metadata.shared <= 99 << 10


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import fastsft
found = fastsft.info()["ops"]
layers = ("rms_norm", "rms_norm_backward", "apply_rope", "swiglu", "swiglu_backward", "swiglu_halves")
for op in (*layers, "sample", "device_linear"):
    assert found[op]["cuda"]["kind"] == "torch", found[op]
    assert found[op]["cuda"]["reason"].startswith("Triton is not installed"), found[op]
"""


def test_info_says_what_serves() -> None:
    import fastsft

    found = fastsft.info()["ops"]
    for op in ("rms_norm", "sample", "device_linear"):
        assert found[op]["cuda"] == {"kind": "triton", "reason": "Triton kernels, not yet run on a GPU"}
    assert found["decoder_step"]["cuda"]["reason"].endswith("not yet run on a GPU")
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)
