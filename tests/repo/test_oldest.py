"""The lower bounds that `make test-oldest` installs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

script = runpy.run_path(str(Path(__file__).parents[2] / ".ci" / "oldest.py"))
lowest = script["lowest"]


def test_of_the_project(capsys: pytest.CaptureFixture[str]) -> None:
    script["main"]()
    lines = capsys.readouterr().out.split()
    assert lines[0] == "torch==2.6"
    assert {line.partition("==")[0] for line in lines} >= {"numpy", "tokenizers", "safetensors", "pydantic", "orjson"}


@pytest.mark.parametrize(
    ("dependency", "expected"),
    [
        ("torch>=2.6", "torch==2.6"),
        ("numpy<3,>=1.26", "numpy==1.26"),
        ("tomli>=2; python_version < '3.0'", None),
        ("tomli>=2; python_version > '3.0'", "tomli==2"),
    ],
)
def test_lowest(dependency: str, expected: str | None) -> None:
    assert lowest(dependency) == expected


@pytest.mark.parametrize("dependency", ["numpy", "numpy==1.26", "numpy>1.26"])
def test_no_lower_bound(dependency: str) -> None:
    with pytest.raises(SystemExit, match=f"expected one lower bound .>=., got '{dependency}'"):
        lowest(dependency)
