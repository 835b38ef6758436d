from __future__ import annotations

from pathlib import Path

import pytest
from kill_resume import Runner, write_texts


@pytest.fixture(scope="session")
def runner() -> Runner:
    return Runner()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "train.jsonl")
