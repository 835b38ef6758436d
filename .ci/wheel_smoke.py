"""Does an installed wheel work? Run by cibuildwheel where the wheel and torch are installed; see docs/wheels.md.

``python wheel_smoke.py [--without-torch]``: the second where no torch can be had: the native module and the data side.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

import fastsft
from fastsft import ops


def import_milliseconds(op: str, before: str) -> float:
    """The least of five processes' times of importing one op and with it the native module, ``before`` not counted."""
    code = (
        f"{before}; import time; t = time.perf_counter(); from fastsft.ops import {op}; print(time.perf_counter() - t)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return 1e3 * min(float(run.stdout) for run in runs)


def check_no_torch_linked() -> Path:
    """One wheel serves every torch: the native module must need no symbol of torch's C++ libraries."""
    import fastsft._C as native

    path = Path(native.__file__)
    content = path.read_bytes()
    names = ("libc10", "libtorch_python", "_ZN3c10", "_ZN2at", "_ZN5torch")
    found = [name for name in names if name.encode() in content]
    if found:
        raise SystemExit(f"{path} names {', '.join(found)}: it would fit one version of torch only")
    return path


def check_data_side() -> None:
    texts = ["a b c d e f g h", "a b c d e f g h", "i j k l m n o p"]
    same, again, other = np.asarray(ops.minhash_signatures(texts, num_perm=128, ngram=3))
    if not (same == again).all() or (same == other).any():
        raise SystemExit(
            f"minhash_signatures: expected two equal rows and a third unlike them, got {same, again, other}"
        )
    bins = [b.tolist() for b in ops.pack_sequences(np.array([3, 5, 2, 6]), capacity=8)]
    if sorted(map(sorted, bins)) != [[0, 1], [2, 3]]:
        raise SystemExit(f"pack_sequences: expected sequences 0 and 1, 2 and 3 together, got {bins}")


def check_tensors() -> None:
    import torch

    from fastsft.ops import reference

    torch.manual_seed(0)
    q, k, v = (torch.randn(97, heads, 64, requires_grad=True) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 31, 31, 97], dtype=torch.int32)
    results = []
    for out in (ops.varlen_attention(q, k, v, cu_seqlens), reference.varlen_attention(q, k, v, cu_seqlens)[0]):
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for name, got, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    kinds = {name: ways["cpu"]["kind"] for name, ways in fastsft.info()["ops"].items() if "cpu" in ways}
    if kinds["varlen_attention_fwd"] != "native" or kinds["linear_cross_entropy"] != "native":
        raise SystemExit(f"expected native kernels on the CPU, got {kinds}")


def main() -> None:
    with_torch = sys.argv[1:] != ["--without-torch"]
    # A local part ("+cpu") tells builds of one version apart.
    if version("fastsft").split("+")[0] != fastsft.__version__:
        raise SystemExit(f"the wheel is {version('fastsft')}, the package in it {fastsft.__version__}")
    native = check_no_torch_linked()
    check_data_side()
    if with_torch:
        check_tensors()
    torch = f"torch {version('torch')}" if with_torch else "no torch"
    op, before = ("varlen_attention", "import torch") if with_torch else ("pack_sequences", "import numpy")
    milliseconds = import_milliseconds(op, before)
    print(f"fastsft {version('fastsft')} works: Python {sys.version.split()[0]}, {torch}")
    print(f"{native.name}: {native.stat().st_size / 1e6:.1f} MB; import after {before[7:]}: {milliseconds:.0f} ms")


if __name__ == "__main__":
    main()
