"""Fixtures of the engine's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_cases import write_adapters, write_heads


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random adapters for the model of the module's own ``folder``."""
    return write_adapters(folder, tmp_path_factory.mktemp("adapters"), "a", "b")


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads for a model of engine_cases' shape; some of their guesses hold by chance."""
    target = tmp_path_factory.mktemp("heads")
    write_heads(target, 0.3)
    return target
