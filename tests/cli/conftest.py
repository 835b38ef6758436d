from __future__ import annotations

from pathlib import Path

import pytest
from cli_cases import conversations, run_file, write

from fastsft import cli


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, run.toml and a trained model in run/model."""
    folder = tmp_path_factory.mktemp("cli")
    cli.main(["train", str(run_file(folder, write(folder / "rows.jsonl", conversations(40))))])
    return folder
