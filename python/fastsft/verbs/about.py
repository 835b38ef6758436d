"""``fastsft info`` and ``fastsft demo``."""

from __future__ import annotations

from pathlib import Path

from fastsft.verbs.console import print_json


def info(*, json: bool = False) -> None:
    """Show what is built, what was found, and which implementation serves each op.

    Args:
        json: machine-readable output.
    """
    import fastsft

    found = fastsft.info()
    if json:
        print_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)  # reasons name extras in brackets
    cpu, cuda = found["cpu"], found["cuda"]
    console.print(f"fastsft {found['fastsft']}, Python {found['python']}, {found['platform']}")
    console.print(
        f"CPU: {cpu['isa_active']} of {', '.join(cpu['isa_available'])}; {cpu['threads']} of {cpu['cores']} cores"
    )
    built = f"kernels for {cuda['built_for']}" if cuda["built_for"] else "not in this build"
    console.print(f"CUDA: {built}; {cuda['devices']} devices; torch's CUDA {cuda['torch']}")
    for gpu in cuda["gpus"]:
        console.print(f"  {', '.join(f'{key} {value}' for key, value in gpu.items())}")
    if cuda["gpus_unread"] and (cuda["torch"] or cuda["built_for"]):
        console.print(f"  GPUs not described: {cuda['gpus_unread']}")
    packages = (f"{name} {version or '-'}" for name, version in found["packages"].items())
    console.print(f"Packages: {', '.join(packages)}")
    table = Table("op", "CPU", "CUDA", title="who serves what")
    for op, where in found["ops"].items():
        table.add_row(
            op, *(f"{where[d]['kind']}: {where[d]['reason']}" if d in where else "-" for d in ("cpu", "cuda"))
        )
    console.print(table)


def demo(*, output: Path = Path("runs/demo"), quick: bool = False, json: bool = False) -> None:
    """Train, tune, execute and sample a small code model on this machine's own Python library.

    Args:
        output: folder for the run and its report.
        quick: a shortened form, for checking that everything works.
        json: print results.json at the end.
    """
    from fastsft.demo.pipeline import run_demo

    results = run_demo(output, quick=quick)
    if json:
        print_json(results)
