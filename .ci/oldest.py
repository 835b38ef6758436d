"""The lower bounds of the package's dependencies, as pip's requirements: ``name==lowest``, one per line."""

from __future__ import annotations

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def lowest(dependency: str) -> str | None:
    """``torch>=2.6`` -> ``torch==2.6``; None where another Python or platform is meant."""
    requirement = Requirement(dependency)
    if requirement.marker is not None and not requirement.marker.evaluate():
        return None
    bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    if len(bounds) != 1:
        raise SystemExit(f"pyproject.toml: dependencies: expected one lower bound (>=), got {dependency!r}")
    return f"{requirement.name}=={bounds[0]}"


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print(*filter(None, map(lowest, project["dependencies"])), sep="\n")


if __name__ == "__main__":
    main()
